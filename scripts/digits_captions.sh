#!/usr/bin/env bash
# Text-to-image on the embedded digits, whose captions are "a handwritten three" and the like: decouple, merge, sample by
# prompt, evaluate. No network, no GPU. Run again, it skips what is complete.
#
#   bash scripts/digits_captions.sh                      # from the pretrained pipeline in assets/digits_captions
#   PRETRAIN=1 bash scripts/digits_captions.sh           # trains its network from nothing first
#   bash scripts/digits_captions.sh name=mine finetune.max_steps=200    # overrides go to every step
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
export ACCELERATE_USE_CPU=true # so small a network is no faster on a GPU

if [ "${PRETRAIN:-0}" = 1 ]; then
  set -- name=digits_captions_from_scratch model.pretrained=null "$@"
  OMP_NUM_THREADS=1 NUM_PROCESSES=1 pretrain configs/digits_captions.yaml "$@"
fi
exec bash scripts/compare.sh configs/digits_captions.yaml "$@"
