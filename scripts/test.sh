#!/usr/bin/env bash
# Lint and tests, in a new environment if there is none.
#
#   bash scripts/test.sh                      # in about 10 minutes on 2 cores
#   bash scripts/test.sh --all                # also the long tests: Slurm, benchmarks, fuzzing, kills, full-size networks
#   bash scripts/test.sh tests/data -k crop   # other arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

selected=(-m "not long")
if [ "${1:-}" = --all ]; then
  selected=()
  shift
fi
ruff check .
ruff format --check .
python -m pytest -n 2 --durations=10 "${selected[@]}" "$@" # most tests start one single-threaded script
