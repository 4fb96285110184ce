#!/usr/bin/env bash
# Where an experiment or a comparison stands that submit.sh submits: what is complete, how far the rest is, and what Slurm
# does about it.
#
#   CLUSTER=configs/slurm/FILE bash scripts/slurm/status.sh CONFIG [overrides]     # as submit.sh was called
#
# Without Slurm it tells what the files say.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/slurm/settings.sh
ask_for_jobs status "$@"
