#!/usr/bin/env bash
# Stable Diffusion v1-4: finetune the ranges and the control, merge, and compare FID and CLIP score on 30,000 images of
# COCO's prompts. docs/text-to-image.md says what to download first.
#
#   bash scripts/stable_diffusion_v1_4.sh                                     # first prints the disk and GPU hours
#   bash scripts/stable_diffusion_v1_4.sh name=mine finetune.max_steps=5000   # overrides apply to every step
#
# Environment variables:
#   CONFIG     the experiment (default: configs/stable_diffusion_v1_4.yaml)
#   REFERENCE  the experiment whose images FID compares with (default: configs/coco_val2014.yaml); none: those of
#              evaluate.reference, or the training data
#   NUM_PROCESSES, MAX_MINUTES (scripts/setup.sh). The same command resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
config=${CONFIG:-configs/stable_diffusion_v1_4.yaml}
reference=${REFERENCE:-configs/coco_val2014.yaml}

MODELS="pretrained continued ensemble merged" python scripts/estimate.py --config "$config" "$@"
[ "$reference" = none ] || set -- "reference=$reference" "$@"
compare --config configs/comparison/paper.yaml "base=$config" "$@"
