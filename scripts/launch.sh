#!/usr/bin/env bash
# Start a script in NUM_PROCESSES processes: with python for one, accelerate for several, torchrun on several nodes.
#
#   bash scripts/launch.sh NUM_PROCESSES SCRIPT ARGUMENTS…
#
# On several nodes, scripts/slurm/job.sh runs this once per node, with NUM_PROCESSES for each. The launchers meet at
# RENDEZVOUS=HOST:PORT from the environment.
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
