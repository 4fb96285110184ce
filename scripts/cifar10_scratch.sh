#!/usr/bin/env bash
# CIFAR-10 without any download: pretrain a DDPM of 9 M parameters, decouple, merge, sample, evaluate.
#
#   bash scripts/cifar10_scratch.sh data.name=FOLDER                     # uoft-cs/cifar10's parquet files
#   MAX_MINUTES=9 bash scripts/cifar10_scratch.sh data.name=FOLDER       # in pieces: run it until the table appears
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
config=configs/cifar10_scratch.yaml

folder=$(ask config.folder $config "$@")

NUM_PROCESSES=${NUM_PROCESSES:-1} launch pretrain.py --config $config "$@" $(max_minutes pretrain)
complete "$folder/pretrained"
[ -z "${MAX_MINUTES:-}" ] || export MAX_MINUTES=$(minutes_left)
bash scripts/compare.sh $config "$@"
