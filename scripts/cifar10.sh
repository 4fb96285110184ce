#!/usr/bin/env bash
# CIFAR-10 from google/ddpm-cifar10-32: statistics, ranges, merge, 50,000 images, FID.
#
#   bash scripts/cifar10.sh                                       # prints the disk and GPU hours that it takes first
#   bash scripts/cifar10.sh name=mine finetune.max_steps=5000     # overrides go to every step
exec bash "$(dirname "$0")/benchmark.sh" configs/cifar10.yaml "$@"
