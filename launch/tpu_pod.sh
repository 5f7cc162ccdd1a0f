#!/usr/bin/env bash
# Train on a Cloud TPU: create it, install this code on all workers, run, follow the log, and restart after preemption.
set -euo pipefail

help() {
    cat <<'HELP'
Usage: launch/tpu_pod.sh --name=NAME --project=PROJECT --zone=ZONE --type=TYPE [OPTIONS] -- ARGS

Creates or reuses a TPU, copies the code, installs it, runs `jaxmodels train --processes=tpu ARGS` on all workers, and
follows the log of worker 0. Called again with the same arguments, it follows the active run.

  --name=NAME         the TPU's name
  --project=PROJECT   the Google Cloud project
  --zone=ZONE         for example us-east5-b
  --type=TYPE         accelerator type, for example v6e-16, v5p-32, v5litepod-16
  --version=VERSION   runtime version, for example v2-alpha-tpuv6e (default: depends on TYPE)
  --spot              use spot capacity, which can be preempted
  --queued            create a queued resource, which waits for capacity
  --bucket=BUCKET     mount this bucket at /shared on all workers (gcsfuse); not needed for --workdir=gs://BUCKET/NAME
  --env=NAME=VALUE    environment variable of the run; repeatable
  --code=head|tree    copy the last commit (default), or the working tree with uncommitted changes
  --max_restarts=N    maximum restarts, for any reason (default: 10)
  --poll=SECONDS      interval between queries of the TPU's state (default: 30)
  --delete            delete the TPU when the run has ended
  --dry_run           print every command; run nothing
  --help

Exit status: that of the run (0 finished, 2 invalid config, 3 diverged: no restart; 75 or 1: restarted at most
--max_restarts times), 1 if the TPU cannot be created, 2 for invalid arguments. See docs/launch.md.
HELP
}

program=tpu_pod.sh
dry_run=false
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"

name='' project='' zone='' type='' version='' bucket='' code=head max_restarts=10 poll=30 spot=false queued=false delete=false variables=()
while (($#)); do
    case $1 in
        --help) help && exit ;;
        --name=*) name=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --version=*) version=${1#*=} ;;
        --bucket=*) bucket=${1#*=} ;;
        --env=*) check_variable "${1#*=}" && variables+=("${1#*=}") ;;
        --code=*) code=${1#*=} ;;
        --max_restarts=*) max_restarts=${1#*=} ;;
        --poll=*) poll=${1#*=} ;;
        --spot) spot=true ;;
        --queued) queued=true ;;
        --delete) delete=true ;;
        --dry_run) dry_run=true ;;
        --) shift && break ;;
        *) unknown "$1" ;;
    esac
    shift
done
check name "$name" '[a-z]([-a-z0-9]*[a-z0-9])?' 'NAME, of lowercase letters, digits and -'
check project "$project" '[-a-z0-9.:]+' 'PROJECT; gcloud projects list lists them'
check zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' 'ZONE, for example us-east5-b'
check type "$type" '[a-z0-9]+-[0-9]+' 'TYPE, for example v6e-16; gcloud compute tpus accelerator-types list lists them'
check code "$code" 'head|tree' 'head or tree'
check max_restarts "$max_restarts" '[0-9]+' 'a whole number'
check poll "$poll" '[0-9]+(\.[0-9]+)?' 'seconds'
[[ $bucket != gs://* ]] || bucket=${bucket#gs://}
[[ -z $bucket ]] || check bucket "$bucket" '[a-z0-9][-_.a-z0-9]*' 'BUCKET, a name without gs://'
check_train "$@"
if [[ -z $bucket ]] && ! has_option workdir "$@"; then
    usage_error "no run folder: give after -- a --workdir=gs://BUCKET/NAME, or one on storage that all workers share, or --bucket=BUCKET"
fi
if [[ -z $version ]]; then
    case ${type%%-*} in
        v6e) version=v2-alpha-tpuv6e ;;
        v5p) version=v2-alpha-tpuv5 ;;
        v5litepod) version=v2-alpha-tpuv5-lite ;;
        v4 | v3 | v2) version=tpu-ubuntu2204-base ;;
        *) usage_error "--version is missing: no default for $type; gcloud compute tpus tpu-vm versions list --zone=$zone lists them" ;;
    esac
fi
needs gcloud 'see https://cloud.google.com/sdk/docs/install'

arguments=(${variables[@]+"${variables[@]}"} -- --processes=tpu "$@")
place=(--project="$project" --zone="$zone" --quiet)
# A preempted machine may not close its connections: let ssh close them after a minute without an answer.
ssh_flags=(--ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=4)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'say "interrupted. The run on the TPU continues; the same command follows it"; exit 130' INT

# describe DRY_ANSWER GROUP FORMAT: print a state, or ABSENT.
describe() {
    local attempt
    for attempt in 1 2 3 4 5; do
        if query "$1" gcloud compute tpus "$2" describe "$name" --format="value($3)" "${place[@]}" 2>"$scratch/error"; then
            return
        elif grep -qiE 'NOT_FOUND|not found' "$scratch/error"; then
            echo ABSENT
            return
        fi
        say "gcloud returned no state (attempt $attempt of 5)"
        pause "$poll"
    done
    fail "gcloud cannot get the state of $name: $(tail -n 1 "$scratch/error")"
}

# tpu_state DRY_ANSWER: print the state of the TPU; READY only if it can be used.
tpu_state() {
    local state
    if $queued; then
        state=$(describe "${1/READY/ACTIVE}" queued-resources state.state) || exit
        if [[ $state != ACTIVE ]]; then
            echo "$state"
            return
        fi
    fi
    state=$(describe "$1" tpu-vm state) || exit
    # A queued resource stays ACTIVE for some time after its TPU was deleted.
    if $queued && [[ $state == ABSENT ]]; then state=PREEMPTED; fi
    echo "$state"
}

create() {
    local flags=()
    if $spot; then flags=(--spot); fi
    if $queued; then
        run gcloud compute tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" \
            ${flags[@]+"${flags[@]}"} "${place[@]}"
    else
        run gcloud compute tpus tpu-vm create "$name" --accelerator-type="$type" --version="$version" ${flags[@]+"${flags[@]}"} "${place[@]}"
    fi
}

remove() {
    if $queued; then
        run gcloud compute tpus queued-resources delete "$name" --force "${place[@]}"
    else
        run gcloud compute tpus tpu-vm delete "$name" "${place[@]}"
    fi
}

# Create the TPU if it does not exist or was preempted, and wait until it is ready. Status 1: it cannot be created now.
ensure_tpu() {
    local state before='' created=false
    state=$(tpu_state ABSENT) || exit
    while :; do
        [[ $state == "$before" ]] || say "$name: $state"
        before=$state
        case $state in
            READY) return ;;
            ABSENT)
                create || return 1
                created=true
                ;;
            FAILED)
                if $created; then return 1; fi
                remove
                ;;
            PREEMPTED | TERMINATED | SUSPENDED) remove ;;
            STOPPED) run gcloud compute tpus tpu-vm start "$name" "${place[@]}" || return 1 ;;
            *) pause "$poll" ;; # a transition
        esac
        state=$(tpu_state READY) || exit
    done
}

# worker WHICH COMMAND...: run tpu_worker.sh COMMAND on a worker or all. The status is that of the first worker that failed.
worker() {
    local which=$1
    shift
    run gcloud compute tpus tpu-vm ssh "$name" --worker="$which" --command="$(quoted bash tpu_worker.sh "$@")" "${ssh_flags[@]}" "${place[@]}"
}

pack() {
    if [[ $code == head ]]; then
        say "copying the last commit, $(git -C "$root" log -1 --format='%h %s')"
        if ! $dry_run && [[ -n $(git -C "$root" status --porcelain) ]]; then say "uncommitted changes are not copied; --code=tree copies them"; fi
        run git -C "$root" archive --format=tar.gz --output="$scratch/jaxmodels.tar.gz" HEAD
    else
        say "copying the working tree, with uncommitted changes"
        # shellcheck disable=SC2016
        run bash -c 'cd "$1" && git ls-files -z --cached --others --exclude-standard --deduplicate |
            while IFS= read -r -d "" file; do [[ ! -e $file ]] || printf "%s\0" "$file"; done | tar --null --files-from=- -czf "$2"' \
            pack "$root" "$scratch/jaxmodels.tar.gz"
    fi
}

install() {
    local flags=()
    if [[ -n $bucket ]]; then flags=(--bucket="$bucket"); fi
    run gcloud compute tpus tpu-vm scp "$scratch/jaxmodels.tar.gz" "$root/launch/tpu_worker.sh" "$name:" --worker=all "${place[@]}" || return
    worker all setup ${flags[@]+"${flags[@]}"}
}

# Set `outcome` to the state of the run over all workers: an exit status, 'running', 'none', or 'lost' if a worker did not answer.
ask_outcome() {
    local states
    outcome=lost
    if ! states=$(query "jaxmodels-worker dry 0" gcloud compute tpus tpu-vm ssh "$name" --worker=all --command="bash tpu_worker.sh status" \
        "${ssh_flags[@]}" "${place[@]}" 2>"$scratch/ssh_error"); then return; fi
    states=" $(awk '$1 == "jaxmodels-worker" { printf "%s ", $3 }' <<<"$states")"
    local candidate
    for candidate in running 2 3 none 75; do # in order of priority: one worker may know the cause better than the others
        if [[ $states == *" $candidate "* ]]; then
            outcome=$candidate
            return
        fi
    done
    outcome=$(tr ' ' '\n' <<<"$states" | grep -E '^[0-9]+$' | sort -n | tail -n 1) || outcome=lost
}

# Follow the log of worker 0 until no worker is running; set `outcome`.
follow() {
    local state unanswered=0
    : >"$scratch/log"
    while :; do
        worker 0 follow "$(($(wc -l <"$scratch/log") + 1))" 2>"$scratch/ssh_error" | tee -a "$scratch/log" || true
        ask_outcome
        case $outcome in
            running) unanswered=0 ;;
            lost)
                state=$(tpu_state READY) || exit
                if [[ $state != READY ]]; then return; fi
                if ((++unanswered >= 10)); then
                    why="the workers do not answer ($(tail -n 1 "$scratch/ssh_error"))"
                    return
                fi
                ;;
            *) return ;;
        esac
        pause "$poll"
    done
}

# Make one attempt: create the TPU if needed, install, start, follow. Set `outcome`, and `why` if the run did not start.
attempt() {
    local tries
    outcome=lost why=''
    if ! ensure_tpu; then
        why="the TPU could not be created"
        return
    fi
    for tries in 1 2 3; do
        if install; then break; fi
        if ((tries == 3)) || [[ $(tpu_state READY) != READY ]]; then
            why="the code could not be installed on all workers"
            return
        fi
        pause "$poll"
    done
    local status=0
    worker all start "${arguments[@]}" || status=$?
    if ((status == 2)); then fail "$name is running another command; use another --name, or wait until it ends"; fi
    if ((status != 0)); then
        why="the run could not be started on all workers"
        return
    fi
    follow
}

# finish STATUS: delete the TPU if requested, and exit.
finish() {
    if $delete; then
        remove || say "$name could not be deleted: it is still billed"
    else
        say "$name still exists, and is billed until it is deleted: $(dry_run=true && remove 3>&1)"
    fi
    exit "$1"
}

outcome='' why=''
pack
for ((restarts = 0; ; restarts++)); do
    attempt
    case $outcome in
        0)
            say "finished"
            finish 0
            ;;
        2 | 3)
            say "the run ended with status $outcome; a restart would not change that"
            finish "$outcome"
            ;;
        75) why="the run was stopped by a signal" ;;
        none) why="the workers were replaced" ;;
        lost) [[ -n $why ]] || why="the workers no longer exist" ;;
        *) why="the run ended with status $outcome" ;;
    esac
    if ((restarts >= max_restarts)); then
        say "$why; --max_restarts=$max_restarts is reached. The same command resumes from the last checkpoint"
        [[ $outcome =~ ^[0-9]+$ ]] || outcome=1
        finish "$outcome"
    fi
    if [[ $why == "the TPU could not be created" && $restarts == 0 ]]; then
        if $queued; then fail "$why; gcloud compute tpus queued-resources describe $name shows details"; fi
        fail "$why; --queued waits for capacity"
    fi
    say "$why; restarting ($((restarts + 1)) of $max_restarts)"
    pause "$poll"
done
