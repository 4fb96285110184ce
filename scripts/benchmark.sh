#!/usr/bin/env bash
# A published benchmark: reference statistics, finetuned ranges, coefficients, merged network, its images, their FID.
# Called by cifar10.sh, lsun_church.sh and lsun_bedroom.sh:   bash scripts/benchmark.sh CONFIG [overrides]
# Environment: NUM_PROCESSES, MAX_MINUTES (scripts/setup.sh). Run again after an interruption, it resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
config=$1
shift

count_processes
NUM_PROCESSES=$processes python scripts/estimate.py --config "$config" "$@"
launch evaluate.py --config "$config" "$@" "evaluate.samples=[]" # the reference statistics alone
launch finetune.py --config "$config" "$@" $(max_minutes finetune)
complete_ranges "$config" "$@"
merge_ranges "$config" "$@"
launch sample_ddp.py --config "$config" "$@"

pass_signals python -m pytorch_fid "$(python sample_ddp.py --path samples --config "$config" "$@")" \
  "$(python evaluate.py --path reference --config "$config" "$@")"
