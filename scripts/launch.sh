#!/usr/bin/env bash
# Start a script over so many processes, by accelerate, or on several nodes torchrun, where there are several.
#
#   bash scripts/launch.sh NUM_PROCESSES SCRIPT ARGUMENTS…
#
# In a Slurm step of several nodes, NUM_PROCESSES on each: scripts/slurm/job.sh starts it once per node, with
# RENDEZVOUS=HOST:PORT in the environment, where these launchers meet.
processes=$1
shift
if [ -n "${RENDEZVOUS:-}" ] && [ "$SLURM_STEP_NUM_NODES" != 1 ]; then
  exec python -m torch.distributed.run --nnodes "$SLURM_STEP_NUM_NODES" --nproc-per-node "$processes" \
    --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "$RENDEZVOUS" "$@"
fi
[ "$processes" != 1 ] || exec python "$@"
# --multi_gpu also starts several processes on a CPU; port 0 is any free one
exec python -m accelerate.commands.launch --multi_gpu --num_processes "$processes" --num_machines 1 \
  --mixed_precision no --dynamo_backend no --main_process_port 0 "$@"
