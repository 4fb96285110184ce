#!/usr/bin/env bash
# Start a script over so many processes, by accelerate where there are several.
#
#   bash scripts/launch.sh NUM_PROCESSES SCRIPT ARGUMENTS…
processes=$1
shift
[ "$processes" != 1 ] || exec python "$@"
# --multi_gpu also starts several processes on a CPU; port 0 is any free one
exec python -m accelerate.commands.launch --multi_gpu --num_processes "$processes" --num_machines 1 \
  --mixed_precision no --dynamo_backend no --main_process_port 0 "$@"
