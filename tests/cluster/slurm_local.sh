#!/usr/bin/env bash
# A real SLURM on one machine, for the tests: as root, without systemd, up in about a second.
#   slurm_local.sh start DIR PORT [NODES]   then: . DIR/env (SLURM_CONF); takes ports PORT to PORT + NODES. When the process
#                                           that has called it is gone, killed perhaps, all is stopped
#   slurm_local.sh node DIR N               starts node N's slurmd, again after a power cut
#   slurm_local.sh stop DIR                 ends what start has begun, by process id
# A node is a slurmd on loopback in namespaces of its own, of processes and of mounts (it alone knows the nodes' names):
# kill -9 of the process in DIR/nodeN.pid takes with it all that runs there, as a power cut does. Nodes claim
# 96 CPUs and 8 GPUs, so that what is written for real ones is accepted. Two partitions: jobs in `urgent` put back
# those in `main`, after $GRACE seconds.
set -euo pipefail
verb=$1
dir=$(realpath -m "$2")

begin() { # NAME COMMAND...
    local name=$1
    shift
    setsid "$@" >>"$dir/$name.out" 2>&1 </dev/null &
    echo $! >"$dir/$name.pid"
}

begin_node() { # N
    mkdir -p "$dir/spool/node$1"
    SLURM_CONF=$dir/slurm.conf HOSTS=$dir/hosts begin "node$1" \
        unshare --mount --pid --fork --kill-child --mount-proc \
        sh -c 'mount --bind "$HOSTS" /etc/hosts && slurmd -D -N "$0"; exit $?' "node$1"
}

configure() { # PORT NODES
    cat <<CONF
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that was put back waits for its old credential to expire: not two minutes, but the least that there is.
AuthInfo=socket=$dir/munge.socket,cred_expire=5
CommunicationParameters=NoAddrCache
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.own
SlurmdPidFile=$dir/%n.own
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
JobRequeue=1
ReturnToService=2
KillWait=3
SlurmdTimeout=5
InactiveLimit=0
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
SlurmdParameters=config_overrides
CONF
    for n in $(seq "$2"); do
        echo "NodeName=node$n NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$(($1 + n)) CPUs=96 Gres=gpu:8"
    done
    echo "PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=${GRACE:-20}"
    echo "PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF"
}

case $verb in
start)
    port=$3 nodes=${4:-2}
    mkdir -p "$dir/state" "$dir/spool"
    chmod 755 "$dir"
    (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
    configure "$port" "$nodes" >"$dir/slurm.conf"
    touch "$dir"/gpu{0..7} # SLURM counts files, and does not mind which
    echo "Name=gpu File=$dir/gpu[0-7]" >"$dir/gres.conf"
    cp /etc/hosts "$dir/hosts"
    for n in $(seq "$nodes"); do echo "127.0.0.1 node$n" >>"$dir/hosts"; done
    export SLURM_CONF=$dir/slurm.conf
    echo "export SLURM_CONF=$SLURM_CONF" >"$dir/env"
    begin watcher sh -c 'tail --pid="$0" -f /dev/null; exec "$1" stop "$2"' $PPID "$(realpath "$0")" "$dir"
    begin munged munged --foreground --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" \
        --pid-file="$dir/munged.own" --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"
    for _ in $(seq 100); do
        [ -S "$dir/munge.socket" ] && break
        sleep 0.05
    done
    begin slurmctld slurmctld -D
    for n in $(seq "$nodes"); do begin_node "$n"; done
    for _ in $(seq 300); do
        [ "$(sinfo -h -N -o %t -p main 2>/dev/null | grep -cx idle)" = "$nodes" ] && exit
        sleep 0.1
    done
    echo "not all nodes came up" >&2
    tail -n 5 "$dir"/*.out >&2
    exit 1
    ;;
node)
    begin_node "$3"
    ;;
stop)
    for file in "$dir"/node*.pid "$dir"/slurmctld.pid "$dir"/munged.pid; do
        [ -f "$file" ] || continue
        kill -9 "$(cat "$file")" 2>/dev/null || true # nothing of it is wanted again
    done
    # a session of its own, this process too where it is the watcher
    [ ! -f "$dir/watcher.pid" ] || kill -9 -- "-$(cat "$dir/watcher.pid")" 2>/dev/null || true
    ;;
esac
