# Sourced by the other scripts, from the repository's root: the Python environment and `launch`.
# Environment: PYTHON (default python3), NUM_PROCESSES (default: every GPU, or 2 processes on a CPU of 2 or more cores).

if [ "${CONDA_DEFAULT_ENV:-}" != deme ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "scripts/setup.sh: error: PYTHON=${PYTHON:-python3} must be Python 3.11 or newer" >&2; exit 2; }
  [ -f .venv/bin/activate ] || "${PYTHON:-python3}" -m venv .venv
  . .venv/bin/activate
fi
installed="$(python -c 'import sys; print(sys.prefix)')/deme-requirements.txt"  # what was installed last
if ! cmp -s requirements.txt "$installed"; then
  python -m pip install -r requirements.txt
  cp requirements.txt "$installed"
fi

# launch SCRIPT ARGUMENTS…: run a script over NUM_PROCESSES processes
launch() {
  if [ -z "${DEVICES:-}" ]; then
    DEVICES=$(python -c 'import torch; print(torch.cuda.device_count())')
  fi
  local processes=${NUM_PROCESSES:-$DEVICES}
  if [ "$DEVICES" = 0 ]; then
    processes=${NUM_PROCESSES:-$(($(nproc 2>/dev/null || echo 1) > 1 ? 2 : 1))}
    export ACCELERATE_USE_CPU=true
  fi
  if [ "$processes" = 1 ]; then
    python "$@"
  else # --multi_gpu also starts several processes on a CPU; port 0 is any free one
    accelerate launch --multi_gpu --num_processes "$processes" --num_machines 1 --mixed_precision no \
      --dynamo_backend no --main_process_port "${MAIN_PROCESS_PORT:-0}" "$@"
  fi
}
