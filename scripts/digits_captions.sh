#!/usr/bin/env bash
# Text-to-image on the embedded digits, whose captions are "a handwritten three" and the like: decouple, merge, distil,
# sample by prompt, evaluate. No network, no GPU. Run again, it skips what is complete.
#
#   bash scripts/digits_captions.sh                      # from the pretrained pipeline in assets/digits_captions
#   PRETRAIN=1 bash scripts/digits_captions.sh           # trains its network from nothing first
#   bash scripts/digits_captions.sh name=mine finetune.max_steps=200    # overrides go to every step
DIGITS=digits_captions exec bash "$(dirname "$0")/digits.sh" "$@"
