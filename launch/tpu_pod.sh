#!/usr/bin/env bash
# Trains on a Cloud TPU: creates it, installs this code on all its workers, runs, follows, and starts again after preemption.
set -euo pipefail

help() {
    cat <<'HELP'
Usage: launch/tpu_pod.sh --name=NAME --project=PROJECT --zone=ZONE --type=TYPE [OPTIONS] -- ARGS

Creates or reuses a TPU, copies the code, installs it, runs `jaxmodels train --processes=tpu ARGS` on all workers, and
follows the log of worker 0. Called again with the same arguments, it finds the run that goes on and follows it.

  --name=NAME         the TPU's name
  --project=PROJECT   the cloud project
  --zone=ZONE         for example us-east5-b
  --type=TYPE         accelerator, for example v6e-16, v5p-32, v5litepod-16
  --version=VERSION   runtime, for example v2-alpha-tpuv6e (default: the one made for TYPE)
  --spot              preemptible capacity
  --queued            a queued resource: waits for capacity
  --bucket=BUCKET     mount this bucket at /shared on all workers (gcsfuse); runs/ then lies in it
  --env=NAME=VALUE    environment variable of the run; may be repeated
  --code=head|tree    copy the last commit (default), or the working tree with what is not committed
  --max_restarts=N    starts after the first, whatever the reason (default: 10)
  --poll=SECONDS      between questions for the TPU's state (default: 30)
  --delete            delete the TPU when the run has ended
  --dry_run           print every command; run none
  --help

Exit status: that of the run (0 finished, 2 bad config, 3 diverged: these are not repeated; 75 or 1: started again,
--max_restarts times), 1 when the TPU cannot be had, 2 for wrong arguments. See docs/launch.md.
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
check name "$name" '[a-z]([-a-z0-9]*[a-z0-9])?' 'NAME, of small letters, digits and -'
check project "$project" '[-a-z0-9.:]+' 'PROJECT, as gcloud projects list shows it'
check zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' 'ZONE, for example us-east5-b'
check type "$type" '[a-z0-9]+-[0-9]+' 'TYPE, for example v6e-16; gcloud compute tpus accelerator-types list shows them'
check code "$code" 'head|tree' 'head or tree'
check max_restarts "$max_restarts" '[0-9]+' 'a whole number'
check poll "$poll" '[0-9]+(\.[0-9]+)?' 'seconds'
[[ $bucket != gs://* ]] || bucket=${bucket#gs://}
[[ -z $bucket ]] || check bucket "$bucket" '[a-z0-9][-_.a-z0-9]*' 'BUCKET, the name alone'
check_train "$@"
if [[ -z $bucket ]] && ! has_option workdir "$@"; then
    usage_error "where is the run to lie? Name --bucket=BUCKET, or after -- a --workdir that all workers share and that outlives the TPU"
fi
if [[ -z $version ]]; then
    case ${type%%-*} in
        v6e) version=v2-alpha-tpuv6e ;;
        v5p) version=v2-alpha-tpuv5 ;;
        v5litepod) version=v2-alpha-tpuv5-lite ;;
        v4 | v3 | v2) version=tpu-ubuntu2204-base ;;
        *) usage_error "--version is missing: no runtime is known for $type; gcloud compute tpus tpu-vm versions list --zone=$zone shows them" ;;
    esac
fi
needs gcloud 'see https://cloud.google.com/sdk/docs/install'

arguments=(${variables[@]+"${variables[@]}"} -- --processes=tpu "$@")
place=(--project="$project" --zone="$zone" --quiet)
# A machine that is taken away may not close its connections: after a minute of silence ssh does.
ssh_flags=(--ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=4)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'say "interrupted. What was started on the TPU goes on; the same command follows it"; exit 130' INT

# describe DRY_ANSWER GROUP FORMAT: a state, or ABSENT.
describe() {
    local attempt
    for attempt in 1 2 3 4 5; do
        if query "$1" gcloud compute tpus "$2" describe "$name" --format="value($3)" "${place[@]}" 2>"$scratch/error"; then
            return
        elif grep -qiE 'NOT_FOUND|not found' "$scratch/error"; then
            echo ABSENT
            return
        fi
        say "gcloud gave no state (attempt $attempt of 5)"
        pause "$poll"
    done
    fail "gcloud cannot tell the state of $name: $(tail -n 1 "$scratch/error")"
}

# tpu_state DRY_ANSWER: READY only if the TPU can be used.
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
    # A queued resource stays active for a while after its TPU has gone.
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

# Returns when the TPU is ready, having created it where there is none or the one there is spent. 1: it cannot be had now.
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
            *) pause "$poll" ;; # on its way somewhere
        esac
        state=$(tpu_state READY) || exit
    done
}

# worker WHICH COMMAND...: tpu_worker.sh COMMAND there. gcloud ends with the status of the first worker that failed.
worker() {
    local which=$1
    shift
    run gcloud compute tpus tpu-vm ssh "$name" --worker="$which" --command="$(quoted bash tpu_worker.sh "$@")" "${ssh_flags[@]}" "${place[@]}"
}

pack() {
    if [[ $code == head ]]; then
        say "copying the last commit, $(git -C "$root" log -1 --format='%h %s')"
        if ! $dry_run && [[ -n $(git -C "$root" status --porcelain) ]]; then say "what is not committed stays here; --code=tree takes it along"; fi
        run git -C "$root" archive --format=tar.gz --output="$scratch/jaxmodels.tar.gz" HEAD
    else
        say "copying the working tree, with what is not committed"
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

# The run's state over all workers, as `outcome`: an exit status, 'running', 'none', or 'lost' where a worker did not answer.
ask_outcome() {
    local states
    outcome=lost
    if ! states=$(query "jaxmodels-worker dry 0" gcloud compute tpus tpu-vm ssh "$name" --worker=all --command="bash tpu_worker.sh status" \
        "${ssh_flags[@]}" "${place[@]}" 2>"$scratch/ssh_error"); then return; fi
    states=" $(awk '$1 == "jaxmodels-worker" { printf "%s ", $3 }' <<<"$states")"
    local candidate
    for candidate in running 2 3 none 75; do # what one worker knows better than the others, first
        if [[ $states == *" $candidate "* ]]; then
            outcome=$candidate
            return
        fi
    done
    outcome=$(tr ' ' '\n' <<<"$states" | grep -E '^[0-9]+$' | sort -n | tail -n 1) || outcome=lost
}

# Follows worker 0 until no worker runs any more; sets `outcome`.
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

# Everything once, on a TPU that may have to be made; sets `outcome`, and `why` where there is nothing to follow.
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
    if ((status == 2)); then fail "$name runs another command; take another --name, or wait for it"; fi
    if ((status != 0)); then
        why="the run could not be started on all workers"
        return
    fi
    follow
}

# The run has ended with STATUS.
finish() {
    if $delete; then
        remove || say "$name could not be deleted: it still costs money"
    else
        say "$name is still there, and costs money, until it is deleted: $(dry_run=true && remove 3>&1)"
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
            say "the run ended with status $outcome, which another start would not change"
            finish "$outcome"
            ;;
        75) why="the run was stopped by a signal" ;;
        none) why="the workers were replaced" ;;
        lost) [[ -n $why ]] || why="the workers are gone" ;;
        *) why="the run ended with status $outcome" ;;
    esac
    if ((restarts >= max_restarts)); then
        say "$why; no start is left of --max_restarts=$max_restarts. The same command goes on from the last checkpoint"
        [[ $outcome =~ ^[0-9]+$ ]] || outcome=1
        finish "$outcome"
    fi
    if [[ $why == "the TPU could not be created" && $restarts == 0 ]]; then
        if $queued; then fail "$why; gcloud compute tpus queued-resources describe $name tells more"; fi
        fail "$why; --queued waits for capacity"
    fi
    say "$why; starting again ($((restarts + 1)) of $max_restarts)"
    pause "$poll"
done
