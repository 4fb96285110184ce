#!/usr/bin/env bash
# Lint and all tests, after the set-up that they need.   bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

ruff check .
ruff format --check .
python -m pytest -n 2 --durations=10 "$@" # most tests start one single-threaded script
