#!/usr/bin/env bash
# Start a script over so many processes, by accelerate where there are several.
#
#   bash scripts/launch.sh NUM_PROCESSES SCRIPT ARGUMENTS…
#
# In a Slurm step of several nodes, NUM_PROCESSES on each: scripts/slurm/job.sh starts it once per node, with
# RENDEZVOUS=HOST:PORT in the environment, where these launchers meet.
processes=$1
shift
nodes=1
machines=(--num_machines 1 --main_process_port 0) # 0: any free one
if [ -n "${RENDEZVOUS:-}" ] && [ "$SLURM_STEP_NUM_NODES" != 1 ]; then
  nodes=$SLURM_STEP_NUM_NODES
  machines=(--num_machines "$nodes" --machine_rank "$SLURM_NODEID" --rdzv_backend c10d)
  machines+=(--main_process_ip "${RENDEZVOUS%:*}" --main_process_port "${RENDEZVOUS##*:}")
fi
[ $((processes * nodes)) != 1 ] || exec python "$@"
# --multi_gpu also starts several processes on a CPU
exec python -m accelerate.commands.launch --multi_gpu --num_processes $((processes * nodes)) "${machines[@]}" \
  --mixed_precision no --dynamo_backend no "$@"
