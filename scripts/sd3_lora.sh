#!/usr/bin/env bash
# Stable Diffusion 3, SANA or Wan: finetune a LoRA for each timestep range on your captioned images and merge them into one LoRA,
# which diffusers loads.
#
#   bash scripts/sd3_lora.sh data.name=FOLDER                          # images and metadata.csv (file_name, text)
#   bash scripts/sd3_lora.sh data.name=FOLDER finetune.max_steps=500   # overrides apply to every step
#   CONFIG=configs/sana_lora.yaml bash scripts/sd3_lora.sh data.name=FOLDER
#
# Environment variables: CONFIG; NUM_PROCESSES (scripts/setup.sh). The same command resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
set -- --config "${CONFIG:-configs/sd3_lora.yaml}" "$@"

python scripts/estimate.py "$@"
pass_signals bash scripts/launch.sh "${NUM_PROCESSES:-1}" finetune.py "$@"
python merge.py "$@"
