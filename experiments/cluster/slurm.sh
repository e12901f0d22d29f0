#!/usr/bin/env bash
# A run on a SLURM cluster that outlives its time limit: five minutes before the end it saves and queues up again.
# Run: sbatch experiments/cluster/slurm.sh --config experiments/quickstart/ar.yaml --config ...
# The options are those of `dar fit`. Change the lines below for your cluster, or override them: sbatch --nodes=4 ...
#SBATCH --job-name=dar
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

soonest=${SOONEST:-60} # seconds; a notice sooner after the start means that --time leaves none to train in

# srun hands signals to all tasks, but while it starts them it loses them: again, when a run that waits for data has stopped.
notice=
trap 'notice=${notice:-$SECONDS}; while kill -USR1 "$step"; do sleep 30; done >/dev/null 2>&1 &' USR1

srun --kill-on-bad-exit=1 dar fit "$@" \
    --trainer.num_nodes="$SLURM_NNODES" --trainer.devices="$SLURM_NTASKS_PER_NODE" &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal interrupts wait
wait "$step"
status=$?

# srun gives the highest code of its tasks. 138: saved (see StopOnSignal), 143: that at SIGTERM, which a more urgent job has
# sent to the tasks, or srun, because another task has ended first, be it of a fault; 137, where that one was killed. So
# above 128 the code alone is no reason to put the job back: that is the notice, or the more urgent job. Less: the run
# has come to its end (0), or all tasks to the same fault (1) or user's mistake (2).
if [ "$status" -gt 128 ]; then
    if [ "${notice:--1}" -ge "$soonest" ] || [[ "$(scontrol show job "$SLURM_JOB_ID")" =~ PreemptTime=[0-9] ]]; then
        scontrol requeue "$SLURM_JOB_ID"
    elif [ "$notice" ] && [[ $status =~ ^(138|143)$ ]]; then # others are no mistake in --time
        echo "slurm.sh: not put back: the notice of the time limit came $notice s after the start; give a --time that is" \
            "longer than the notice (--signal, here 300 s) by the time to start and to train in" >&2
        status=2
    fi
fi
exit "$status"
