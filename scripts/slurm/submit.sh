#!/usr/bin/env bash
# Submit an experiment, or all runs of a comparison (configs/comparison/), to Slurm. Each job waits only for the jobs whose
# output it reads: the data's cache and statistics, the trainings, search and merge, images of each model, table and report.
#
#   CLUSTER=configs/slurm/FILE bash scripts/slurm/submit.sh CONFIG [overrides]
#   DRY_RUN=1 …                 # prints the sbatch lines
#
# Run again, it submits what is missing and neither queued nor running. scripts/slurm/settings.sh lists the settings of a
# cluster; see docs/clusters.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/slurm/settings.sh
ask_for_jobs submit "$@"
