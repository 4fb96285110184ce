#!/usr/bin/env bash
# The whole pipeline on the embedded digits: decouple, search, merge, distil, sample, evaluate, report. No network, no GPU,
# 5 minutes on 2 cores. Run again, it skips what is complete.
#
#   bash scripts/digits.sh                            # from the pretrained pipeline in assets/digits
#   PRETRAIN=1 bash scripts/digits.sh                 # from nothing: pretrains first (20 minutes more)
#   bash scripts/digits.sh name=mine finetune.max_steps=200    # overrides go to every step
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
export ACCELERATE_USE_CPU=true # so small a network is no faster on a GPU
name=${DIGITS:-digits} # or digits_captions, which scripts/digits_captions.sh sets

# a third of the configuration's images
[ $name != digits ] || set -- sample.num_images=3594 self_training.num_images=3000 "$@"
[ "${PRETRAIN:-0}" != 1 ] || set -- name=${name}_from_scratch model.pretrained=null "$@"
compare base=configs/$name.yaml "$@"
