#!/usr/bin/env bash
# Submit a whole experiment to Slurm, as jobs that wait for what they need and for nothing else: the data's cache and
# statistics, all trainings side by side, search and merge, images of each model, the table and the report.
#
#   CLUSTER=configs/slurm/FILE bash scripts/slurm/submit.sh CONFIG [overrides]
#   DRY_RUN=1 …                 # prints the sbatch lines
#
# Run again, it submits what is missing and neither queued nor running. What a cluster wants to be told stands in
# scripts/slurm/settings.sh; docs/clusters.md says more.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/slurm/queue.sh
[ -n "${DRY_RUN:-}" ] || command -v sbatch >/dev/null ||
  { echo "sbatch: not found; DRY_RUN=1 prints what would be submitted" >&2; exit 2; }

# what may be under way is not submitted a second time
no_answer() {
  exit 1
}
open_queue "$@"
if [ -z "${DRY_RUN:-}" ]; then
  mkdir -p "$logs"
  exec 9>>"$jobs_file"
  flock -n 9 || { echo "$jobs_file: another submit.sh is writing it" >&2; exit 2; }
fi
count=0

# submit STAGE SCRIPTS MADE_FROM AFTER TASKS ARGUMENTS…: what is missing of a stage, as visit_stages names it
submit() {
  local stage=$1 scripts=$2 made_from=$3 after=$4 state task id number=0 missing=() array=() waited
  waited=$(under_way $made_from)
  while IFS=$'\t' read -r state _ task; do
    if [ -n "$(under_way "$stage/$task")" ] || { [ "$state" = complete ] && [ -z "$waited" ]; }; then
      continue
    fi
    missing+=("$task")
  done <<<"$5"
  [ ${#missing[@]} -gt 0 ] || return 0
  shift 5
  [ -z "${missing[0]}" ] || array=(--array="0-$((${#missing[@]} - 1))")
  waited=$(under_way $made_from $after)
  id=$(batch "$stage" ${array[@]+"${array[@]}"} ${waited:+--dependency="afterok$waited" --kill-on-invalid-dep=yes} \
    scripts/slurm/job.sh "$scripts" "$@" ${missing[0]:+-- "${missing[@]}"})
  for task in "${missing[@]}"; do
    job["$stage/$task"]=$id${array[0]:+_$number}
    is_under_way["$stage/$task"]=queued
    number=$((number + 1))
    [ -n "${DRY_RUN:-}" ] || printf '%s\t%s\n' "$stage/$task" "${job["$stage/$task"]}" >&9
    [ -n "${DRY_RUN:-}" ] || printf '%-18s %-26s job %s\n' "$stage" "$task" "${job["$stage/$task"]}"
  done
  count=$((count + ${#missing[@]}))
}

# batch STAGE OPTIONS… COMMAND: its job's id; in a dry run the stage's name, and the line on standard error
batch() {
  local stage=$1 id line log=%x-%j.log
  shift
  case $1 in --array=*) log=%x-%A_%a.log ;; esac
  line=(sbatch --parsable --job-name="$name-$stage" --nodes="$NODES" --ntasks-per-node=1)
  line+=(${PARTITION:+--partition="$PARTITION"} ${ACCOUNT:+--account="$ACCOUNT"} ${TIME:+--time="$TIME"})
  line+=(${CPUS:+--cpus-per-task="$CPUS"})
  [ "$GPUS" = 0 ] || line+=(--gpus-per-node="$GPUS")
  line+=($OPTIONS --export=ALL --requeue --open-mode=append --signal="B:USR1@$NOTICE" --output="$logs/$log")
  line+=("$@")
  if [ -n "${DRY_RUN:-}" ]; then
    { printf '%q ' "${line[@]}"; echo; } >&3
    echo "${stage^^}"
    return
  fi
  id=$("${line[@]}" 9>&-)
  echo "${id%%;*}" # behind it, the name of a cluster
}

# everything is asked first: a mistake in what a late stage is told leaves no early one submitted
stages=()
note() {
  stages+=("$#" "$@")
}
visit_stages note "$@"
exec 3>&1
while [ ${#stages[@]} -gt 0 ]; do
  submit "${stages[@]:1:stages[0]}"
  stages=("${stages[@]:stages[0]+1}")
done
echo "$count task(s) submitted; where they stand:"
printf '  bash scripts/slurm/status.sh'
printf ' %q' "$@"
echo
