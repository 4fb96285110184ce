# Sourced by the other scripts, from the repository's root: the Python environment, `launch` and time limits.
# Environment: PYTHON, which makes .venv (default python3); AS_IT_IS=1: takes the `python` that is found, as it is;
# NUM_PROCESSES (default: one per GPU; on a CPU, 2); MAX_MINUTES, after which a script stops, to be resumed by the same
# command (default: none).

make_environment() {
  if [ "${CONDA_DEFAULT_ENV:-}" != deme ]; then
    if [ ! -f .venv/bin/activate ]; then
      "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "scripts/setup.sh: error: PYTHON=${PYTHON:-python3} must be Python 3.11 or newer" >&2; exit 2; }
      "${PYTHON:-python3}" -m venv .venv
    fi
    . .venv/bin/activate
  fi
  local installed
  installed="$(python -c 'import sys; print(sys.prefix)')/deme-requirements.txt" # what was installed last
  if ! cmp -s requirements.txt "$installed"; then
    python -m pip install -r requirements.txt
    cp requirements.txt "$installed"
  fi
}
[ "${AS_IT_IS:-0}" = 1 ] || make_environment

# whole_number NAME LEAST: end with one line unless this variable holds a whole number, LEAST (0 or 1) or above
whole_number() {
  case "${!1}" in
    *[!0-9]* | "" | 0?*) ;;
    *) [ "${!1}" -lt "$2" ] || return 0 ;;
  esac
  local above=" above 0"
  [ "$2" = 1 ] || above=
  echo "$1=${!1}: must be a whole number$above" >&2
  exit 2
}

# a mistake in the environment: one line
case "${MAX_MINUTES:-1}" in
  *[!0-9.]* | *.*.* | . | "" | 0 | 0. | 0.0) echo "MAX_MINUTES=$MAX_MINUTES: must be a number above 0" >&2; exit 2 ;;
esac
[ -z "${NUM_PROCESSES:-}" ] || whole_number NUM_PROCESSES 1

# count_processes: sets `gpus`, the number of GPUs that the scripts use, and `processes`, that of processes of `launch`
gpus= # counted once, and not by scripts that launch nothing: it takes an import of torch
count_processes() {
  if [ -z "$gpus" ]; then
    gpus=0
    [ "${ACCELERATE_USE_CPU:-false}" = true ] || gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    [ "$gpus" -gt 0 ] || export ACCELERATE_USE_CPU=true
  fi
  processes=${NUM_PROCESSES:-$((gpus > 0 ? gpus : $(getconf _NPROCESSORS_ONLN) > 1 ? 2 : 1))}
}

# launch SCRIPT ARGUMENTS…: run a script over NUM_PROCESSES processes, no longer than MAX_MINUTES allows
launch() {
  local limit="" status=0
  python "$@" --dry-run >/dev/null || return # a mistake in the configuration: one line, before the launcher's own
  count_processes
  [ -z "${MAX_MINUTES:-}" ] || limit="timeout --foreground $(minutes_left)m"
  pass_signals $limit bash scripts/launch.sh "$processes" "$@" || status=$?
  [ $status = 124 ] && resume_later
  return $status
}

# pass_signals COMMAND…: run a command in a process group of its own, which SIGTERM and Ctrl-C go on to; its status
pass_signals() {
  local child status=0
  set -m
  "$@" &
  child=$!
  set +m
  trap 'kill -TERM -- -$child' TERM HUP
  trap 'kill -INT -- -$child' INT
  while
    wait $child # returns early when a signal comes
    status=$?
    kill -0 $child 2>/dev/null
  do :; done
  trap - TERM HUP INT
  return $status
}

# minutes_left: how many of MAX_MINUTES, counted from the start of the script
minutes_left() {
  awk -v "limit=$MAX_MINUTES" -v "used=$SECONDS" 'BEGIN { left = limit - used / 60; print (left > 0.01 ? left : 0.01) }'
}

# max_minutes SECTION: an override that lets training end with a checkpoint half a minute before MAX_MINUTES
max_minutes() {
  [ -z "${MAX_MINUTES:-}" ] || awk -v "left=$(minutes_left)" -v "key=$1.max_minutes" \
    'BEGIN { print key "=" (left > 0.6 ? left - 0.5 : 0.1) }'
}

# complete FOLDER: end the script here, without an error, when training was stopped before it made the folder
complete() {
  [ -d "$1" ] || resume_later
}

# complete_ranges CONFIG OVERRIDES…: the same for the networks that merge.py needs
complete_ranges() {
  local config=$1 unets unet
  shift
  unets=$(python finetune.py --path finetuned --config "$config" "$@")
  while read -r unet; do
    complete "$unet"
  done <<<"$unets"
}

# merge_ranges CONFIG OVERRIDES…: search for the coefficients where merge.coefficients=search, and merge
merge_ranges() {
  local config=$1
  shift
  [ -z "$(python merge.py --path searched --config "$config" "$@")" ] || launch search.py --config "$config" "$@"
  pass_signals python merge.py --config "$config" "$@"
}

# compare_models MODELS CONFIG OVERRIDES…: draw from the models that a table compares, a row each, and score them
compare_models() {
  local models=$1 config=$2 model
  shift 2
  for model in $models; do
    launch sample_ddp.py --config "$config" "$@" sample.model=$model
  done
  launch evaluate.py --config "$config" "$@"
  pass_signals python merge.py --config "$config" "$@" # once more, for the model card: it has scores now
}

resume_later() {
  echo "stopped by its time limit: the same command resumes"
  exit 0
}

# compare CONFIG OVERRIDES…: pretrain where that is asked for, train, merge, draw, score, and tell the story on one page
compare() {
  local config=$1 limit="" status=0 run
  shift
  run=$(python finetune.py --path run --config "$config" "$@")
  [ -z "${MAX_MINUTES:-}" ] || limit="timeout --foreground $(minutes_left)m"
  pass_signals $limit python compare.py "base=$config" "$@" || status=$?
  [ $status != 124 ] || resume_later
  [ $status = 0 ] || return $status
  echo "page: $run/report.html"
  echo "pictures:"
  find "$run/samples" "$run/finetuned" -name 'grid-*.png' -o -path '*/previews/*.png' | sort
}
