#!/usr/bin/env bash
# A run on several machines without a scheduler. On each of them, within some minutes:
#   NODE=0 NODES=2 GPUS=8 HEAD=10.0.0.1 experiments/cluster/torchrun.sh --config experiments/quickstart/ar.yaml ...
#   NODE     number of this machine, from 0       NODES  of how many
#   GPUS     processes on each machine            HEAD   address of machine 0, with its port if that is not 29400
#   RESTARTS how often all ranks start again, from the last checkpoint, after one has died (3)
#   ADDRESS  this machine's own, where its host name does not lead the others to it
# The options are those of `dar fit`.
set -euo pipefail

if [ "$NODE" -eq 0 ]; then is_host=true; else is_host=false; fi
# A store that restarts share still holds the addresses of the ranks before: a rank that is back first would call those, and
# fail, until no restart is left. So every start gets a store of its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
    --nnodes="$NODES" --nproc-per-node="$GPUS" --max-restarts="${RESTARTS:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-conf=is_host="$is_host" --rdzv-id=dar \
    ${ADDRESS:+--local-addr="$ADDRESS"} \
    -m dar_lightning fit "$@" --trainer.num_nodes="$NODES" --trainer.devices="$GPUS"
