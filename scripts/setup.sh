# Sourced by the other scripts, from the repository's root: the Python environment, `launch` and `run_folder`.
# Environment: PYTHON, which makes .venv (default python3); NUM_PROCESSES (default: one per GPU; on a CPU, 2).

if [ "${CONDA_DEFAULT_ENV:-}" != deme ]; then
  if [ ! -f .venv/bin/activate ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      { echo "scripts/setup.sh: error: PYTHON=${PYTHON:-python3} must be Python 3.11 or newer" >&2; exit 2; }
    "${PYTHON:-python3}" -m venv .venv
  fi
  . .venv/bin/activate
fi
installed="$(python -c 'import sys; print(sys.prefix)')/deme-requirements.txt" # what was installed last
if ! cmp -s requirements.txt "$installed"; then
  python -m pip install -r requirements.txt
  cp requirements.txt "$installed"
fi

# launch SCRIPT ARGUMENTS…: run a script over NUM_PROCESSES processes
launch() {
  local gpus=0 processes
  if [ "${ACCELERATE_USE_CPU:-false}" != true ]; then
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
  fi
  if [ "$gpus" -gt 0 ]; then
    processes=${NUM_PROCESSES:-$gpus}
  else
    processes=${NUM_PROCESSES:-$(($(getconf _NPROCESSORS_ONLN) > 1 ? 2 : 1))}
    export ACCELERATE_USE_CPU=true
  fi
  if [ "$processes" = 1 ]; then
    python "$@"
  else # --multi_gpu also starts several processes on a CPU; port 0 is any free one
    accelerate launch --multi_gpu --num_processes "$processes" --num_machines 1 --mixed_precision no \
      --dynamo_backend no --main_process_port "${MAIN_PROCESS_PORT:-0}" "$@"
  fi
}

# run_folder CONFIG OVERRIDES…: the folder of a run
run_folder() {
  python -c 'import sys; from deme.config import load_config; print(load_config(sys.argv[1], sys.argv[2:]).folder)' "$@"
}
