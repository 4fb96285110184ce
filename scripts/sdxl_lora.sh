#!/usr/bin/env bash
# Stable Diffusion XL: finetune a LoRA for each timestep range on your captioned images and merge them into one LoRA, which
# diffusers, ComfyUI and A1111 load.
#
#   bash scripts/sdxl_lora.sh data.name=FOLDER                          # images and metadata.csv (file_name, text)
#   bash scripts/sdxl_lora.sh data.name=FOLDER finetune.max_steps=500   # overrides apply to every step
#
# Environment variable: NUM_PROCESSES (scripts/setup.sh). The same command resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
set -- --config configs/sdxl_lora.yaml "$@"

python scripts/estimate.py "$@"
pass_signals bash scripts/launch.sh "${NUM_PROCESSES:-1}" finetune.py "$@"
python merge.py "$@"
python merge.py "$@" merge.lora_format=kohya "merge.output=$(python merge.py "$@" --path merged)-kohya"
