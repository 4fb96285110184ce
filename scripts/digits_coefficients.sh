#!/usr/bin/env bash
# How merge.coefficients of configs/digits.yaml were picked: candidates scored on seeds that the results table of
# scripts/digits.sh does not use. Run that first.   bash scripts/digits_coefficients.sh [overrides]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

export ACCELERATE_USE_CPU=true
run=$(python merge.py --path run "$@")
candidates=(0.1,0.1,0.1,0.1 0.25,0.25,0.25,0.25 0.5,0.5,0.5,0.5 0.75,0.75,0.75,0.75 1,1,1,1 0.1,0.1,0.2,0.5 0.5,0.2,0.1,0.1)
seeds="sample.seed_offset=100000"

launch sample_ddp.py sample.model=pretrained "sample.output=$run/selection/pretrained" $seeds "$@"
folders="\"$run/selection/pretrained\""
for candidate in "${candidates[@]}"; do
  merged=$run/candidates/$candidate
  pass_signals python merge.py "merge.coefficients=[$candidate]" "merge.output=$merged" "$@"
  launch sample_ddp.py "sample.model=$merged" "sample.output=$run/selection/$candidate" $seeds "$@"
  folders+=",\"$run/selection/$candidate\""
done
launch evaluate.py "evaluate.samples=[$folders]" "evaluate.output=$run/selection.json" "$@"
