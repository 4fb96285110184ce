#!/usr/bin/env bash
# One job of submit.sh, or one task of a job array: runs a script in all processes of the job's nodes.
#
#   sbatch … scripts/slurm/job.sh LEDGER NODES PROCESSES SCRIPT --config CONFIG [overrides] -- NAME KEY OVERRIDE…
#
# PROCESSES is per node; empty: one per GPU, or 1. A task of an array takes the NAME, KEY and OVERRIDE of its number. When it
# is done, the file LEDGER/NAME holds KEY, the hash of the entries of the jobs in LEDGER/../before/NAME, and the hash of the
# files in LEDGER/../made/NAME. This repeats deme/compare/jobs.py in bash, because Python may be inside a container. Slurm
# sends USR1 before the time limit and, if configured, before another job takes the nodes. The script then saves, and the job
# requeues itself, at most MAX_REQUEUES times.
set -euo pipefail

# of a task of an array, by its number: the last one's SLURM_JOB_ID also stands for the whole array
id=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
child=           # srun
must_stop=false  # as Slurm says
must_queue=false # again: it lacked time, or another job took the nodes

# stop: let the processes save. Not by way of srun, which would kill them at a SIGTERM
stop() {
  must_stop=true
  while [ -n "$child" ] && kill -0 "$child" 2>/dev/null; do
    ! scancel --signal=TERM "$id.0" 2>/dev/null || break
    sleep 1 # the step is about to start
  done
}
trap 'must_queue=true; stop' USR1
trap stop TERM

. scripts/slurm/settings.sh # sbatch runs a copy of this file, in the folder where it was submitted: the repository
[ -n "$CONTAINER" ] || . scripts/setup.sh # a container has a Python of its own
# seconds that the launcher leaves its processes for saving, instead of 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$NOTICE

ledger=$1
nodes=$2
processes=${3:-$((GPUS > 0 ? GPUS : 1))}
script=$4
shift 4
arguments=()
while [ "$1" != -- ]; do
  arguments+=("$1")
  shift
done
shift $((1 + 3 * ${SLURM_ARRAY_TASK_ID:-0}))
name=$1
key=$2
[ -z "$3" ] || arguments+=("$3")

# planned KIND: the lines of LEDGER/../KIND/NAME; none where submit.sh wrote no such file
planned() {
  ! [ -f "${ledger%/*}/$1/$name" ] || cat "${ledger%/*}/$1/$name"
}

# made_of: what stands for the entries of the jobs before this one
made_of() {
  planned before | while IFS= read -r before; do
    ! [ -f "$ledger/$before" ] || cat "$ledger/$before"
  done | sha256sum | cut -d ' ' -f 1
}

# free_port: one that nothing listens on here; jobs that share a node begin their search at different ones
free_port() {
  local port=$((20000 + SLURM_JOB_ID % 10000))
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
  echo "$port"
}

# run: the script over the processes of all nodes; its status
run() {
  local status
  RENDEZVOUS=$(hostname):$(free_port) srun --nodes="$nodes" --ntasks="$nodes" ${CPUS:+--cpus-per-task="$CPUS"} \
    --kill-on-bad-exit=1 $CONTAINER bash scripts/launch.sh "$processes" "$script" "${arguments[@]}" &
  child=$!
  while
    status=0
    wait "$child" || status=$? # returns early when a signal comes
    kill -0 "$child" 2>/dev/null
  do :; done
  child=
  return $status
}

made_of=$(made_of)
rm -f "$ledger/$name" # what there was of it no longer counts
status=143
if [ $must_stop = false ]; then
  status=0
  run || status=$?
fi
if [ $status = 0 ]; then
  mkdir -p "$ledger"
  printf '%s\n' "$key" "$made_of" "$(planned made | bash scripts/state_of.sh)" >"$ledger/$name"
fi

# another job takes the nodes: the grace time began with a SIGTERM to all processes, and Slurm counts a job that ends
# within it as failed
if [ $status != 0 ] && scontrol show job "$id" | grep ' PreemptTime=[0-9]' >/dev/null; then
  must_queue=true
fi
if [ $must_queue = true ] && [ $status != 0 ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_REQUEUES" ]; then
    echo "stopped for the lack of time, or for another job; queued again, to go on where it was"
    scontrol requeue "$id"
    exit 0
  fi
  echo "MAX_REQUEUES=$MAX_REQUEUES: so often has this job been queued again; scripts/slurm/submit.sh goes on" >&2
fi
exit $status
