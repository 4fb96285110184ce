#!/usr/bin/env bash
# LSUN-Bedroom from google/ddpm-ema-bedroom-256: statistics, ranges, merge, 50,000 images, FID.
#
#   bash scripts/lsun_bedroom.sh data.name=FOLDER                 # prints the disk and GPU hours that it takes first
#   bash scripts/lsun_bedroom.sh name=mine finetune.max_steps=5000     # overrides go to every step
exec bash "$(dirname "$0")/benchmark.sh" configs/lsun_bedroom.yaml "$@"
