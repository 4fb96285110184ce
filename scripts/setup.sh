# Sourced by the other scripts from the repository's root. Makes the Python environment; defines `compare`.
# Environment variables:
#   PYTHON         makes .venv (default: python3)
#   AS_IT_IS       1: use the `python` on the PATH, install nothing
#   NUM_PROCESSES  GPUs, or CPU cores, of each job (default: 1)
#   MAX_MINUTES    stop after this time; the same command resumes (default: no limit)

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

case "${MAX_MINUTES:-1}" in
  *[!0-9.]* | *.*.* | . | "" | 0 | 0. | 0.0) echo "MAX_MINUTES=$MAX_MINUTES: must be a number above 0" >&2; exit 2 ;;
esac
[ -z "${NUM_PROCESSES:-}" ] || whole_number NUM_PROCESSES 1

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

# compare ARGUMENTS…: compare.py, no longer than MAX_MINUTES after the start of the script allows
compare() {
  local limit="" status=0
  if [ -n "${MAX_MINUTES:-}" ]; then
    limit=$(awk "BEGIN { left = 60 * $MAX_MINUTES - $SECONDS; print (left > 1 ? left : 1) }")
    limit="timeout --foreground $limit"
  fi
  pass_signals $limit python compare.py "$@" || status=$?
  if [ $status = 124 ]; then
    echo "stopped by its time limit: the same command resumes"
    exit 0
  fi
  return $status
}
