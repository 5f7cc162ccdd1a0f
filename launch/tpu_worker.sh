#!/usr/bin/env bash
# Commands for one TPU worker: tpu_pod.sh copies this file there and calls it over ssh. Every command is idempotent.
set -euo pipefail

help() {
    cat <<'HELP'
Usage: bash tpu_worker.sh COMMAND

  setup [--bucket=BUCKET] [--extra=tpu]  unpack ~/jaxmodels.tar.gz, mount the bucket, install into a virtual environment
  start [NAME=VALUE...] -- ARGS...       run jaxmodels train ARGS in the background, unless it is already running
  follow LINE                            print the log from LINE until the run ends
  status                                 print 'jaxmodels-worker HOST STATE'; STATE is running, none, or the exit status

The bucket is mounted at /shared ($JAXMODELS_SHARED), and runs/ is /shared/runs.
HELP
}

shared=${JAXMODELS_SHARED:-/shared}
code=$HOME/jaxmodels
environment=$HOME/jaxmodels_environment
state=$HOME/jaxmodels_run # arguments, process, boot, log, status

this_boot() {
    cat /proc/sys/kernel/random/boot_id
}

# After a reboot, another process may have the same process ID.
is_running() {
    [[ -f $state/process && ! -f $state/status && $(<"$state/boot") == "$(this_boot)" ]] && kill -0 "$(<"$state/process")" 2>/dev/null
}

# Mount a bucket as a folder. Saving a checkpoint ends with renaming a folder, which is atomic only in a bucket with a hierarchical namespace.
mount_bucket() {
    if ! command -v gcsfuse >/dev/null; then
        . /etc/os-release
        local packages=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
        curl --fail --silent --show-error "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
        echo "deb [signed-by=$key] $packages gcsfuse-$VERSION_CODENAME main" |
            sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
        sudo apt-get update -qq
        sudo apt-get install -y -qq -o DPkg::Lock::Timeout=300 gcsfuse # a new machine runs its own updates
    fi
    [[ -d $shared ]] || sudo install --directory --owner="$(id -un)" "$shared"
    mountpoint -q "$shared" || gcsfuse --implicit-dirs "$1" "$shared"
    mkdir -p "$shared/runs"
}

# Create an environment with Python 3.11 or later: the images of some TPUs have an older default.
make_environment() {
    local python
    rm -rf "$environment"
    for python in python3.13 python3.12 python3.11 python3; do
        if "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$python" -m venv "$environment"
            return
        fi
    done
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python=3.12 "$environment"
}

setup() {
    local bucket='' extra=tpu argument checksum
    for argument in "$@"; do
        case $argument in
            --bucket=*) bucket=${argument#*=} ;;
            --extra=*) extra=${argument#*=} ;;
            *) echo "tpu_worker.sh: unknown argument $argument" >&2 && exit 2 ;;
        esac
    done
    if is_running; then
        echo "$(hostname): a run is active; its code is not changed"
        return
    fi
    [[ -z $bucket ]] || mount_bucket "$bucket"
    checksum=$(sha256sum <"$HOME/jaxmodels.tar.gz")
    if [[ -f $environment/installed && $(<"$environment/installed") == "$checksum $extra $bucket" ]]; then
        echo "$(hostname): this code is already installed"
        return
    fi
    rm -rf "$code"
    mkdir -p "$code"
    tar -xzf "$HOME/jaxmodels.tar.gz" -C "$code"
    [[ -z $bucket ]] || ln -sfn "$shared/runs" "$code/runs"
    make_environment
    "$environment/bin/python" -m pip install --quiet "${code}[$extra]"
    echo "$checksum $extra $bucket" >"$environment/installed"
    echo "$(hostname): installed"
}

start() {
    local arguments variables=()
    printf -v arguments '%q ' "$@"
    while [[ $1 != -- ]]; do
        variables+=("$1")
        shift
    done
    shift
    if is_running; then
        [[ $(<"$state/arguments") == "$arguments" ]] && return
        echo "tpu_worker.sh: $(hostname) is running another command: $(<"$state/arguments")" >&2
        exit 2
    fi
    mkdir -p "$state"
    rm -f "$state/status" "$state/process"
    printf '%s' "$arguments" >"$state/arguments"
    this_boot >"$state/boot"
    : >"$state/log"
    cd "$code"
    # In its own session, so that it survives the end of the connection.
    # shellcheck disable=SC2016
    PYTHONUNBUFFERED=1 setsid nohup bash -c '
        status=0
        env "${@:2}" || status=$?
        echo "$status" >"$1/status.new"
        mv "$1/status.new" "$1/status"
    ' worker "$state" ${variables[@]+"${variables[@]}"} "$environment/bin/jaxmodels" train "$@" >"$state/log" 2>&1 </dev/null &
    echo "$!" >"$state/process"
    echo "$(hostname): started"
}

follow() {
    [[ -f $state/log ]] || return 0
    if is_running; then
        tail --lines="+$1" --pid="$(<"$state/process")" --follow "$state/log"
    else
        tail --lines="+$1" "$state/log"
    fi
}

status() {
    local now=none
    if is_running; then
        now=running
    elif [[ -f $state/status ]]; then
        now=$(<"$state/status")
    elif [[ -f $state/process ]]; then
        now=137 # no exit status: killed, or the machine was rebooted
    fi
    echo "jaxmodels-worker $(hostname) $now"
}

case ${1:-} in
    setup | start | follow | status) "$@" ;;
    --help) help ;;
    *)
        help >&2
        exit 2
        ;;
esac
