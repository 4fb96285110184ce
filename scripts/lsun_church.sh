#!/usr/bin/env bash
# LSUN-Church from google/ddpm-ema-church-256: statistics, ranges, merge, 50,000 images, FID.
#
#   bash scripts/lsun_church.sh                                       # prints the disk and GPU hours that it takes first
#   bash scripts/lsun_church.sh name=mine finetune.max_steps=5000     # overrides go to every step
exec bash "$(dirname "$0")/benchmark.sh" configs/lsun_church.yaml "$@"
