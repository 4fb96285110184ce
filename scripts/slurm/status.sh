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
. scripts/setup.sh
check_settings
[ $# -gt 0 ] || { echo "bash scripts/slurm/status.sh CONFIG [overrides]" >&2; exit 2; }
exec python scripts/slurm/jobs.py status "$@"
