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

ending=
trap 'ending=yes; kill -USR1 "$step"' USR1 # srun hands it to all tasks

srun --kill-on-bad-exit=1 dar fit "$@" \
    --trainer.num_nodes="$SLURM_NNODES" --trainer.devices="$SLURM_NTASKS_PER_NODE" &
step=$!
wait "$step"
status=$?
if [ "$ending" ]; then # the signal has interrupted wait
    wait "$step"
    status=$?
fi

# 138: saved (see StopOnSignal), 143: ended by srun because another task was done first. Less: the run has come to its
# end, or to a user's mistake.
if [ "$ending" ] && [ "$status" -gt 128 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
