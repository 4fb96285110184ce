#!/usr/bin/env bash
# Lint and all tests, after the set-up that they need.   bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

ruff check .
ruff format --check .
python -m pytest --durations=10 "$@"
