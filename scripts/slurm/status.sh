#!/usr/bin/env bash
# Where an experiment stands that submit.sh submits: what is complete, how far the rest is, and what Slurm does about it.
#
#   CLUSTER=configs/slurm/FILE bash scripts/slurm/status.sh CONFIG [overrides]     # as submit.sh was called
#
# Without Slurm it tells what the files say.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/slurm/queue.sh

no_answer() {
  echo "Slurm does not answer: the files alone"
}
open_queue "$@"
count=0
complete=0

# show STAGE SCRIPTS MADE_FROM AFTER TASKS ARGUMENTS…: a line for each task of a stage, as visit_stages names it
show() {
  local stage=$1 state where task id
  while IFS=$'\t' read -r state where task; do
    count=$((count + 1))
    id=${job["$stage/$task"]:-}
    if [ "$state" = complete ]; then
      complete=$((complete + 1))
      id=
    elif [ -d "${where%/unet}/checkpoints" ]; then
      state="step $(newest_step "${where%/unet}/checkpoints") of ${state% steps}"
    fi
    printf '%-18s %-26s %-20s %s\n' "$stage" "$task" "$state" "${id:+job $id ${is_under_way["$stage/$task"]:-ended}}"
  done <<<"$5"
}

# newest_step FOLDER: of the checkpoints in it
newest_step() {
  local step=0 checkpoint
  for checkpoint in "$1"/step-*; do
    [ ! -d "$checkpoint" ] || step=$((10#${checkpoint##*-}))
  done
  echo "$step"
}

visit_stages show "$@"
echo "$complete of $count complete"
[ "$complete" = "$count" ] || [ ! -d "$logs" ] || echo "what the jobs said: $logs/"
