# Sourced by submit.sh and status.sh, from the repository's root: settings and stages, and which jobs of an experiment
# Slurm knows. Where it does not answer, `no_answer`, which they define, is called.

. scripts/slurm/settings.sh
. scripts/setup.sh
check_settings
. scripts/slurm/stages.sh
[ $# -gt 0 ] || { echo "bash scripts/slurm/${0##*/} CONFIG [overrides]" >&2; exit 2; }

declare -A job=()          # task, as STAGE/OVERRIDE → id of the job that it was last submitted as
declare -A is_under_way=() # the same → Slurm's word for it, where it is queued or runs

# open_queue CONFIG [overrides]: sets `name` and `logs` of the experiment, `jobs_file`, and what that and Slurm say
open_queue() {
  local run task id state queue=""
  run=$(python finetune.py --path run --config "$@")
  name=${run##*/}
  logs=$run/slurm
  jobs_file=$logs/jobs.tsv
  [ -f "$jobs_file" ] || return 0
  while IFS=$'\t' read -r task id; do
    job["$task"]=$id
  done <"$jobs_file"
  if command -v squeue >/dev/null; then
    queue=$(squeue --noheader --array --user="$(id -un)" --format='%i %T') || no_answer
  fi
  for task in "${!job[@]}"; do
    state=$(awk -v id="${job["$task"]}" '$1 == id { print $2 }' <<<"$queue")
    [ -z "$state" ] || is_under_way["$task"]=$state
  done
}

# under_way TASK…: the ids of those that are queued or run, a colon before each
under_way() {
  local task
  for task; do
    [ -z "${is_under_way["$task"]:-}" ] || printf ':%s' "${job["$task"]}"
  done
}
