#!/usr/bin/env bash
# CIFAR-10 without any download: pretrain a DDPM of 9 M parameters, decouple, merge, distil, sample, evaluate.
#
#   bash scripts/cifar10_scratch.sh data.name=FOLDER                     # uoft-cs/cifar10's parquet files
#   MAX_MINUTES=9 bash scripts/cifar10_scratch.sh data.name=FOLDER       # in pieces: run it until the table appears
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

compare base=configs/cifar10_scratch.yaml "$@"
