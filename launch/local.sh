#!/usr/bin/env bash
# Train with several processes on this machine.
#
#   launch/local.sh -n N [--cpu_devices=K | --gpus] [--logs=DIR] [--dry_run] -- ARGS
#
# ARGS are the arguments of `jaxmodels train`; the variable JAXMODELS replaces the command `jaxmodels`. Each process writes to
# DIR/process-I.log; the log of process 0 is also shown. SIGTERM and SIGINT are forwarded once; a second SIGINT kills. When one
# process fails, the others have LEAVE_SECONDS (90) to end by themselves, then they are killed. The exit status is that of the
# first process that failed, or 75 if all stopped after saving.
set -euo pipefail
set -m # each process has its own process group, so that Ctrl-C reaches it only through this script

usage() {
  sed -n '2,9s/^# \{0,1\}//p' "$0"
}

fail() {
  echo "local.sh: $1 (see launch/local.sh --help)" >&2
  exit 2
}

count=
devices=
gpus=false
logs=logs
dry_run=false
while [ $# -gt 0 ]; do
  case $1 in
    -n) [ $# -gt 1 ] || fail "-n needs a number"; count=$2; shift ;;
    -n?*) count=${1#-n} ;;
    --cpu_devices=*) devices=${1#*=} ;;
    --gpus) gpus=true ;;
    --logs=*) logs=${1#*=} ;;
    --dry_run) dry_run=true ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument $1; arguments of jaxmodels train come after --" ;;
  esac
  shift
done
[[ $count =~ ^[1-9][0-9]*$ ]] || fail "-n must be a number of processes above 0, got '$count'"
[[ -z $devices || $devices =~ ^[1-9][0-9]*$ ]] || fail "--cpu_devices must be a number above 0, got '$devices'"
if $gpus && [ -n "$devices" ]; then fail "--gpus and --cpu_devices exclude each other"; fi
[ -n "$logs" ] || fail "--logs needs a folder"
[ $# -gt 0 ] || fail "no arguments of jaxmodels train: give them after --"

read -r -a program <<<"${JAXMODELS:-jaxmodels}"
# A port below the default range for outgoing connections in Linux.
port=$(python3 - <<'PYTHON'
import random, socket
for port in random.sample(range(20000, 32000), 12000):
    try:
        with socket.socket() as one:
            one.bind(("127.0.0.1", port))
        print(port)
        break
    except OSError:
        pass
PYTHON
)
[ -n "$port" ] || fail "no free port between 20000 and 32000"

command=()
compose() { # set `command` to the command of process $1
  command=(env "JAXMODELS_COORDINATOR=127.0.0.1:$port" "JAXMODELS_PROCESSES=$count" "JAXMODELS_PROCESS=$1")
  if $gpus; then command+=("JAX_LOCAL_DEVICE_IDS=$1"); fi
  command+=("${program[@]}" train)
  if [ -n "$devices" ]; then command+=("--cpu_devices=$devices"); fi
  command+=("${@:2}")
}

if $dry_run; then
  printf 'mkdir -p %q\n' "$logs"
  for ((i = 0; i < count; i++)); do
    compose "$i" "$@"
    printf '%q ' "${command[@]}"
    printf '> %q 2>&1 &\n' "$logs/process-$i.log"
  done
  exit 0
fi

mkdir -p "$logs"
pids=()
signalled=
# shellcheck disable=SC2329  # called by traps
forward() { # forward signal $1 to all running processes
  if [ -n "$signalled" ] && [ "$1" = INT ]; then
    kill_rest
  elif [ -z "$signalled" ]; then
    signalled=$1
    for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
  fi
}
kill_rest() { # kill all processes and their children
  for pid in "${pids[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
}
trap 'forward TERM' TERM
trap 'forward INT' INT
trap kill_rest EXIT

for ((i = 0; i < count; i++)); do
  compose "$i" "$@"
  "${command[@]}" >"$logs/process-$i.log" 2>&1 </dev/null &
  pids+=($!)
done

shown=0
show() { # print the new output of process 0
  local size
  size=$(wc -c <"$logs/process-0.log")
  if [ "$size" -gt "$shown" ]; then
    tail -c "+$((shown + 1))" "$logs/process-0.log" | head -c "$((size - shown))" || true
    shown=$size
  fi
}

first= # exit status of the first process that failed
since=0
running=("${!pids[@]}")
while [ ${#running[@]} -gt 0 ]; do
  sleep 0.2 || true
  still=()
  for i in "${running[@]}"; do
    if kill -0 "${pids[i]}" 2>/dev/null; then
      still+=("$i")
      continue
    fi
    status=0
    wait "${pids[i]}" || status=$?
    if [ "$status" -ne 0 ] && [ -z "$first" ]; then
      first=$status
      since=$SECONDS
      [ "$status" -eq 75 ] || echo "local.sh: process $i ended with status $status; see $logs/process-$i.log" >&2
    fi
  done
  running=("${still[@]+"${still[@]}"}")
  show
  if [ -n "$first" ] && [ ${#running[@]} -gt 0 ] && [ $((SECONDS - since)) -gt "${LEAVE_SECONDS:-90}" ]; then
    echo "local.sh: process ${running[*]} did not end by itself: killed" >&2
    kill_rest
  fi
done
trap - EXIT
kill_rest # children of killed processes
exit "${first:-0}"
