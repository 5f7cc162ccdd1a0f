#!/usr/bin/env bash
# A SLURM of one node out of Debian's packages, on this machine, for the tests marked slow that submit jobs; as root:
#
#   tests/slurm/setup.sh         install and start it
#   tests/slurm/setup.sh stop    end it; its packages and folders stay
#
# Two partitions: main, and spot, whose jobs are queued again when a job of main needs their processors. Needs no systemd.
set -euo pipefail

mark='# written by tests/slurm/setup.sh of jaxmodels'
configuration=/etc/slurm/slurm.conf
folder=/var/lib/jaxmodels-slurm

# end PIDFILE PROGRAM: ends the process of that number, if it is still that program.
end() {
    [[ -f $1 ]] || return 0
    local number
    number=$(<"$1")
    if [[ $(ps -o comm= -p "$number") == "$2" ]]; then
        kill "$number"
        while kill -0 "$number" 2>/dev/null; do sleep 0.2; done
    fi
    rm -f "$1"
}

stop() {
    end "$folder/slurmd.pid" slurmd
    end "$folder/slurmctld.pid" slurmctld
    end "$folder/munged.pid" munged
}

if [[ $(id -u) != 0 ]]; then
    echo "setup.sh: must be root" >&2
    exit 2
fi
if [[ -f $configuration ]] && ! grep -qF "$mark" "$configuration"; then
    echo "setup.sh: $configuration is of another SLURM, which is left alone" >&2
    exit 2
fi
stop
if [[ ${1:-} == stop ]]; then exit; fi

if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
fi

node=$(hostname --short)
mkdir -p /etc/slurm "$folder/state" "$folder/spool" "$folder/munge"
cat >"$configuration" <<END
$mark
ClusterName=one
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# A job that was queued again may begin when its old credentials are worth nothing any more; the default is two minutes.
AuthInfo=socket=$folder/munge/socket,cred_expire=10
CryptoType=crypto/munge
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
# No control groups: they need a systemd.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
SlurmdParameters=config_overrides
NodeName=$node NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes=$node Default=YES PriorityTier=2 PreemptMode=OFF State=UP
PartitionName=spot Nodes=$node PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
END

munged --key-file=/etc/munge/munge.key --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
    --seed-file="$folder/munged.seed" --force
slurmctld
slurmd
for _ in {1..60}; do
    if [[ $(sinfo --noheader --partition=main --format=%t 2>/dev/null) == idle ]]; then
        sinfo
        exit
    fi
    sleep 1
done
echo "setup.sh: the node does not come up; see $folder/*.log" >&2
exit 1
