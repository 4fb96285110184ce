#!/usr/bin/env bash
# Submit a whole experiment to Slurm, as jobs that wait for what they need and for nothing else: the data's cache and
# statistics, all trainings side by side, search and merge, images of each model, the table and the report. Of a
# comparison (configs/comparison/) all of its runs.
#
#   CLUSTER=configs/slurm/FILE bash scripts/slurm/submit.sh CONFIG [overrides]
#   DRY_RUN=1 …                 # prints the sbatch lines
#
# Run again, it submits what is missing and neither queued nor running. What a cluster wants to be told stands in
# scripts/slurm/settings.sh; docs/clusters.md says more.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/slurm/settings.sh
ask_for_jobs submit "$@"
