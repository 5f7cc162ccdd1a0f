#!/usr/bin/env bash
# Train on Kubernetes: build the image, submit a JobSet, follow its log, and report how it ended.
set -euo pipefail

help() {
    cat <<'HELP'
Usage: launch/gke/run.sh --name=NAME --image=IMAGE (--tpu=ACCELERATOR --topology=T --hosts=N | --gpu=ACCELERATOR --hosts=N)
                         [--bucket=BUCKET | --claim=CLAIM] [OPTIONS] -- ARGS

Runs `jaxmodels train ARGS` as the JobSet NAME, with one process on each host. The run folder is in a bucket (--workdir=gs://BUCKET/NAME in ARGS),
or on a volume that all hosts share at /shared, which contains runs/ (--bucket, --claim).

  --name=NAME             the JobSet's name
  --image=IMAGE           for example us-docker.pkg.dev/PROJECT/REPOSITORY/jaxmodels:TAG
  --build                 first build the image from the working tree and push it
  --tpu=ACCELERATOR       node label cloud.google.com/gke-tpu-accelerator, for example tpu-v6e-slice
  --topology=TOPOLOGY     node label cloud.google.com/gke-tpu-topology of one slice, for example 4x4
  --slices=N              TPU slices (default: 1)
  --gpu=ACCELERATOR       node label cloud.google.com/gke-accelerator, for example nvidia-h100-80gb
  --hosts=N               hosts of a slice, or with --gpu, hosts of the run (default: 1)
  --chips=N               chips or GPUs of one host (default: 4 for TPU, 8 for GPU)
  --bucket=BUCKET         mount this bucket at /shared (Cloud Storage FUSE)
  --claim=CLAIM           mount this PersistentVolumeClaim at /shared; it must be ReadWriteMany (Filestore)
  --env=NAME=VALUE        environment variable of the run; repeatable
  --queue=QUEUE           local queue of Kueue
  --spot                  use spot nodes
  --max_restarts=N        maximum restarts after failures (default: 3); preemptions do not count
  --grace=SECONDS         time between SIGTERM and SIGKILL, for saving (default: 300)
  --service_account=NAME  Kubernetes service account, with access to the bucket (default: default)
  --namespace=NAMESPACE   (default: default)
  --follow                submit nothing; follow the existing JobSet NAME (needs only --name)
  --poll=SECONDS          interval between queries of the JobSet's state (default: 10)
  --dry_run               print every command and the manifest; run nothing
  --help

Exit status: 0 finished, 2 invalid config or arguments, 3 diverged, 1 other failure. See docs/launch.md.
HELP
}

program=gke/run.sh
dry_run=false
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"

name='' image='' tpu='' topology='' slices=1 gpu='' hosts=1 chips='' bucket='' claim='' queue='' max_restarts=3 grace=300
service_account=default namespace=default poll=10 build=false spot=false follow_only=false variables=()
while (($#)); do
    case $1 in
        --help) help && exit ;;
        --name=*) name=${1#*=} ;;
        --image=*) image=${1#*=} ;;
        --tpu=*) tpu=${1#*=} ;;
        --topology=*) topology=${1#*=} ;;
        --slices=*) slices=${1#*=} ;;
        --gpu=*) gpu=${1#*=} ;;
        --hosts=*) hosts=${1#*=} ;;
        --chips=*) chips=${1#*=} ;;
        --bucket=*) bucket=${1#*=} ;;
        --claim=*) claim=${1#*=} ;;
        --env=*) check_variable "${1#*=}" && variables+=("${1#*=}") ;;
        --queue=*) queue=${1#*=} ;;
        --max_restarts=*) max_restarts=${1#*=} ;;
        --grace=*) grace=${1#*=} ;;
        --service_account=*) service_account=${1#*=} ;;
        --namespace=*) namespace=${1#*=} ;;
        --poll=*) poll=${1#*=} ;;
        --build) build=true ;;
        --spot) spot=true ;;
        --follow) follow_only=true ;;
        --dry_run) dry_run=true ;;
        --) shift && break ;;
        *) unknown "$1" ;;
    esac
    shift
done

label='[a-z0-9]([-a-z0-9]*[a-z0-9])?'
check_options() {
    check image "$image" '[a-zA-Z0-9][-a-zA-Z0-9._/:@]*' 'IMAGE, for example us-docker.pkg.dev/PROJECT/REPOSITORY/jaxmodels:TAG'
    [[ -n $tpu || -n $gpu ]] || usage_error "no accelerator: give --tpu=ACCELERATOR --topology=TOPOLOGY, or --gpu=ACCELERATOR"
    [[ -z $tpu || -z $gpu ]] || usage_error "--tpu and --gpu exclude each other"
    if [[ -n $tpu ]]; then
        check tpu "$tpu" "$label" 'ACCELERATOR, for example tpu-v6e-slice'
        check topology "$topology" '[0-9]+x[0-9]+(x[0-9]+)?' 'TOPOLOGY of one slice, for example 4x4'
        chips=${chips:-4}
        local count=$((${topology//x/ * }))
        ((count == hosts * chips)) || usage_error "--topology=$topology has $count chips, but --hosts=$hosts with --chips=$chips have \
$((hosts * chips)); try --hosts=$(((count + chips - 1) / chips))"
    else
        check gpu "$gpu" "$label" 'ACCELERATOR, for example nvidia-h100-80gb'
        [[ -z $topology && $slices == 1 ]] || usage_error "--topology and --slices are for TPUs; use --hosts=N for GPUs"
        chips=${chips:-8}
    fi
    [[ -n $bucket || -n $claim ]] || has_remote_workdir "$@" ||
        usage_error "no shared volume: give --workdir=gs://BUCKET/NAME after --, or a volume with --bucket=BUCKET or --claim=CLAIM"
    [[ -z $bucket || -z $claim ]] || usage_error "--bucket and --claim exclude each other"
    bucket=${bucket#gs://}
    [[ -z $bucket ]] || check bucket "$bucket" '[a-z0-9][-_.a-z0-9]*' 'BUCKET, a name without gs://'
    [[ -z $claim ]] || check claim "$claim" "$label" 'CLAIM, the name of a PersistentVolumeClaim'
    [[ -z $queue ]] || check queue "$queue" "$label" 'QUEUE, a local queue; kubectl get localqueue lists them'
    check service_account "$service_account" "$label" 'NAME'
}

check name "$name" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' 'NAME, at most 40 lowercase letters, digits and -'
check namespace "$namespace" "$label" 'NAMESPACE'
check poll "$poll" '[0-9]+(\.[0-9]+)?' 'seconds'
for option in hosts slices max_restarts grace; do
    check "$option" "${!option}" '0|[1-9][0-9]*' 'a whole number'
done
[[ -z $chips ]] || check chips "$chips" '[1-9][0-9]*' 'a whole number above 0'
((hosts > 0 && slices > 0)) || usage_error "--hosts and --slices must be at least 1"
if ! $follow_only; then
    check_options "$@"
    check_train "$@"
    for argument in "$@"; do
        case $argument in
            --workdir=gs://* | --workdir=s3://*) ;;
            --workdir=runs/* | --workdir=/shared/*) ;;
            --workdir*) usage_error "$argument would be lost with the container: use --workdir=gs://BUCKET/NAME, or runs/NAME on the shared volume" ;;
        esac
    done
fi
needs kubectl 'see https://kubernetes.io/docs/tasks/tools'
if $build; then needs docker 'see https://docs.docker.com/engine/install'; fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'say "interrupted. The JobSet continues; --follow follows it, kubectl delete jobset $name stops it"; exit 130' INT

# manifest ARGS: print the JobSet.
manifest() {
    local labels='{}' annotations='{}' pod_annotations='{}' selector resources tolerations security volume_kind volume script
    [[ -z $queue ]] || labels="{\"kueue.x-k8s.io/queue-name\": \"$queue\"}"
    # Number the hosts through all slices, like the numbers of the TPU runtime.
    # shellcheck disable=SC2016
    script='mkdir -p /shared/runs; export JAXMODELS_PROCESS=$((JOB_INDEX * HOSTS_IN_JOB + HOST_INDEX)); exec env "$@"'
    if [[ -n $tpu ]]; then
        # One slice is one node pool, so two Jobs must not share a node pool.
        annotations='{"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}'
        selector="\"cloud.google.com/gke-tpu-accelerator\": \"$tpu\", \"cloud.google.com/gke-tpu-topology\": \"$topology\""
        resources="{\"google.com/tpu\": \"$chips\"}"
        # The driver locks memory, and its devices belong to root.
        security='{"runAsUser": 0, "capabilities": {"add": ["SYS_RESOURCE"]}}'
        script="ulimit -l 68719476736; $script"
        tolerations='{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}'
    else
        selector="\"cloud.google.com/gke-accelerator\": \"$gpu\""
        resources="{\"nvidia.com/gpu\": \"$chips\"}"
        security='{"runAsUser": 1000, "runAsNonRoot": true, "allowPrivilegeEscalation": false}'
        tolerations='{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}'
    fi
    if $spot; then
        selector+=', "cloud.google.com/gke-spot": "true"'
        tolerations+=', {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}'
    fi
    if [[ -n $bucket ]]; then
        volume_kind=csi
        volume="{\"bucketName\": \"$bucket\", \"mountOptions\": \"implicit-dirs,uid=1000,gid=1000\"}"
        volume="{\"driver\": \"gcsfuse.csi.storage.gke.io\", \"volumeAttributes\": $volume}"
        pod_annotations='{"gke-gcsfuse/volumes": "true"}'
    elif [[ -n $claim ]]; then
        volume_kind=persistentVolumeClaim
        volume="{\"claimName\": \"$claim\"}"
    else # the run is in a bucket; /shared is a folder of the container
        volume_kind=emptyDir
        volume='{}'
    fi
    python3 "$root/launch/gke/render.py" "$root/launch/gke/jobset.yaml" NAME="$name" NAMESPACE="$namespace" IMAGE="$image" \
        LABELS:="$labels" ANNOTATIONS:="$annotations" POD_ANNOTATIONS:="$pod_annotations" MAX_RESTARTS:="$max_restarts" \
        SLICES:="$slices" HOSTS:="$hosts" HOSTS_TEXT="$hosts" PROCESSES="$((slices * hosts))" COORDINATOR="$name-workers-0-0.$name:8482" \
        GRACE:="$grace" SERVICE_ACCOUNT="$service_account" NODE_SELECTOR:="{$selector}" TOLERATIONS:="[$tolerations]" \
        SECURITY:="$security" RESOURCES:="$resources" VOLUME_KIND="$volume_kind" VOLUME:="$volume" SCRIPT="$script" -- \
        ${variables[@]+"${variables[@]}"} jaxmodels train "$@"
}

kube=(kubectl --namespace="$namespace")

# jobset_state ANSWER: print 'STATE RESTARTS' of the JobSet, where STATE is Completed, Failed, Active or Absent.
jobset_state() {
    local line attempt
    for attempt in 1 2 3 4 5; do
        if line=$(query "$1" "${kube[@]}" get jobset "$name" --output='jsonpath={.status.terminalState}/{.status.restarts}' 2>"$scratch/error"); then
            [[ $line != /* ]] || line=Active$line
            line=${line/\// }
            [[ $line != *' ' ]] || line="${line}0"
            echo "$line"
            return
        elif grep -qi 'NotFound' "$scratch/error"; then
            echo 'Absent 0'
            return
        fi
        say "kubectl returned no state (attempt $attempt of 5)"
        pause "$poll"
    done
    fail "kubectl cannot get the state of $name: $(tail -n 1 "$scratch/error")"
}

pod_and_phase='jsonpath={range .items[*]}{.metadata.name} {.status.phase}{"\n"}{end}'
first_pod="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"

# Follow the log of the first host through all restarts until the JobSet has ended; set `state`.
follow() {
    local pod phase before='' seen='' restarts
    while :; do
        state=$(jobset_state Completed/0) || exit
        restarts=${state#* } state=${state% *}
        [[ "$state $restarts" == "$before" ]] || say "$name: $state$( ((restarts == 0)) || printf ', restarts: %s' "$restarts")"
        before="$state $restarts"
        [[ $state != Absent ]] || return 0
        read -r pod phase < <(query "$name-workers-0-0 Succeeded" "${kube[@]}" get pods --selector="$first_pod" \
            --sort-by=.metadata.creationTimestamp --output="$pod_and_phase" 2>/dev/null | tail -n 1) || true
        case ${phase:-Pending} in
            Running | Succeeded | Failed)
                if [[ $pod != "$seen" ]]; then
                    seen=$pod
                    run "${kube[@]}" logs --follow --container=train "$pod" || true
                    continue # query its state without a pause
                elif [[ $phase == Running ]]; then
                    run "${kube[@]}" logs --follow --tail=0 --container=train "$pod" || true # the connection was lost
                fi
                ;;
        esac
        [[ $state == Active ]] || return 0
        pause "$poll"
    done
}

if ! $follow_only; then
    if $build; then
        extra=$([[ -n $tpu ]] && echo tpu || echo cuda)
        run docker build --file="$root/launch/gke/Dockerfile" --build-arg="EXTRA=$extra" --tag="$image" "$root"
        run docker push "$image"
    fi
    manifest "$@" >"$scratch/jobset.yaml"
    state=$(jobset_state Absent/0) || exit
    case ${state% *} in
        Active) usage_error "$name is already running: --follow follows it, kubectl delete jobset $name stops it" ;;
        Completed | Failed) run "${kube[@]}" delete jobset "$name" --wait=true ;;
    esac
    run "${kube[@]}" apply --filename="$scratch/jobset.yaml"
    if $dry_run; then sed 's/^/    /' "$scratch/jobset.yaml" >&3; fi
fi

state=''
follow
case $state in
    Completed) say "finished" && exit 0 ;;
    Absent) fail "the JobSet $name does not exist: it was deleted" ;;
esac
# The cause of the failure: the exit statuses of the pods.
statuses=" $("${kube[@]}" get pods --selector="jobset.sigs.k8s.io/jobset-name=$name" \
    --output='jsonpath={range .items[*]}{.status.containerStatuses[0].state.terminated.exitCode}{" "}{end}') "
for status in 2 3; do
    if [[ $statuses == *" $status "* ]]; then
        say "the run ended with status $status; a restart would not change that"
        exit "$status"
    fi
done
fail "failed with exit statuses: $statuses; see kubectl describe jobset $name. The same command resumes from the last checkpoint"
