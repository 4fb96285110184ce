#!/usr/bin/env bash
# LoRAs of timestep ranges on the embedded digits, text-to-image: the pretrained network, one LoRA of all timesteps, the
# ensemble of LoRAs, the merged LoRA, and the same at rank 4; a table and a page. No network, no GPU, 4 minutes on
# 2 cores. Run again, it skips what is complete.
#
#   bash scripts/digits_lora.sh
#   bash scripts/digits_lora.sh finetune.lora_rank=2 name=mine    # overrides go to every step
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
export ACCELERATE_USE_CPU=true # so small a network is no faster on a GPU
compare --config configs/comparison/lora.yaml "$@"
