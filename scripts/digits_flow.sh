#!/usr/bin/env bash
# The whole method on a small transformer that was trained by flow matching on the embedded digits: decouple, search, merge,
# distil, sample, evaluate, report. No network, no GPU, 4 minutes on 2 cores. Run again, it skips what is complete.
#
#   bash scripts/digits_flow.sh                        # from the pretrained pipeline in assets/digits_flow
#   bash scripts/digits_flow.sh name=mine finetune.max_steps=100    # overrides go to every step
#   python pretrain.py --config configs/digits_flow.yaml            # makes such a pipeline
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
export ACCELERATE_USE_CPU=true # so small a network is no faster on a GPU
compare base=configs/digits_flow.yaml "$@"
