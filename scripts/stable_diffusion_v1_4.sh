#!/usr/bin/env bash
# Stable Diffusion v1-4: statistics of COCO, ranges, control, merge, 30,000 images of each of four models by COCO's
# prompts, the table of FID and CLIP score. What has to be downloaded first: docs/published-benchmarks.md.
#
#   bash scripts/stable_diffusion_v1_4.sh                                  # prints the disk and GPU hours first
#   bash scripts/stable_diffusion_v1_4.sh name=mine finetune.max_steps=5000   # overrides go to every step
#
# Environment: CONFIG (default configs/stable_diffusion_v1_4.yaml), REFERENCE, the configuration of the images that FID
# compares with (default configs/coco_val2014.yaml; none: evaluate.reference's file, or the data), NUM_PROCESSES,
# MAX_MINUTES (scripts/setup.sh). Run again after an interruption, it resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
config=${CONFIG:-configs/stable_diffusion_v1_4.yaml}
reference=${REFERENCE:-configs/coco_val2014.yaml}

count_processes
MODELS=4 NUM_PROCESSES=$processes python scripts/estimate.py --config "$config" "$@"
[ "$reference" = none ] || launch evaluate.py --config "$reference" "evaluate.samples=[]"

launch finetune.py --config "$config" "$@" $(max_minutes finetune)
complete_ranges "$config" "$@"
launch finetune.py --config "$config" "$@" finetune.range=continued $(max_minutes finetune)
complete "$(python finetune.py --path continued --config "$config" "$@")"

merge_ranges "$config" "$@"
compare_models "pretrained continued ensemble merged" "$config" "$@"
