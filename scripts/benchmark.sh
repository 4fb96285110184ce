#!/usr/bin/env bash
# A published benchmark: finetune the ranges, merge them, and compare the FID with that of the pretrained network.
# Called by cifar10.sh, lsun_church.sh and lsun_bedroom.sh:   bash scripts/benchmark.sh CONFIG [overrides]
# Environment: NUM_PROCESSES, MAX_MINUTES (scripts/setup.sh). The same command resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
config=$1
shift

python scripts/estimate.py --config "$config" "$@"
compare --config configs/comparison/benchmark.yaml "base=$config" "$@"
pass_signals python -m pytorch_fid "$(python sample_ddp.py --path samples --config "$config" "$@")" \
  "$(python evaluate.py --path reference --config "$config" "$@")"
