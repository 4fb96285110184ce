#!/usr/bin/env bash
# Print the status of an experiment or a comparison: what is complete, how far the rest is, and the state of its Slurm jobs.
#
#   CLUSTER=configs/slurm/FILE bash scripts/slurm/status.sh CONFIG [overrides]     # as submit.sh was called
#
# Without Slurm it reads the files alone.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/slurm/settings.sh
ask_for_jobs status "$@"
