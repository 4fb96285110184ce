# Sourced by the other scripts of this folder, from the repository's root: what a cluster wants to be told.
# Each setting has its value from the environment, else from the file CLUSTER (configs/slurm/), else from here.

defaults=(
  CLUSTER=          # file of lines NAME=VALUE
  PARTITION=        # of Slurm; these three: as the cluster has it, where they are empty
  ACCOUNT=          # that is charged
  TIME=             # limit of each job, as sbatch takes it: 12:00:00
  GPUS=0            # of each node; 0: the CPU is used
  CPUS=             # of each node; empty: as the cluster has it
  NODES=1           # of each job
  NUM_PROCESSES=    # of each node; empty: one per GPU, or 1
  BLOCKS=1          # jobs that draw from each model, side by side
  OPTIONS=          # more of sbatch's: --qos=… --constraint=…
  SETUP=            # shell command before anything else: module load …; conda activate deme
  AS_IT_IS=0        # 1: the Python that SETUP gives is taken, and no .venv made
  CONTAINER=        # what srun gets before the command: --container-image=…, or apptainer exec --nv FILE
  NOTICE=120        # seconds before the time limit at which a job saves, and queues again
  MAX_REQUEUES=20   # of a job
)

names=" "
for default in "${defaults[@]}"; do
  names+="${default%%=*} "
done

# settings of the environment stand above those of the file
given=()
for name in $names; do
  [ -z "${!name+set}" ] || given+=("$name=${!name}")
done
if [ -n "${CLUSTER:-}" ]; then
  [ -f "$CLUSTER" ] || { echo "CLUSTER=$CLUSTER: no such file" >&2; exit 2; }
  for name in $(sed -n 's/^ *\([^ #=]*\)=.*/\1/p' "$CLUSTER"); do
    [[ $names == *" $name "* ]] || { echo "$CLUSTER: $name: must be one of${names% }" >&2; exit 2; }
  done
  . "$CLUSTER"
fi
for setting in ${given[@]+"${given[@]}"}; do
  printf -v "${setting%%=*}" %s "${setting#*=}"
done
for default in "${defaults[@]}"; do
  name=${default%%=*}
  [ -n "${!name+set}" ] || printf -v "$name" %s "${default#*=}"
done

set +u # others' scripts
. /dev/stdin <<<"$SETUP" || { echo "SETUP=$SETUP: failed" >&2; exit 2; }
set -u
[ "$GPUS" != 0 ] || export ACCELERATE_USE_CPU=true
export $names

# ask_for_jobs submit|status CONFIG [overrides]: the end of these scripts; mistakes in the settings: one line
ask_for_jobs() {
  local name
  . scripts/setup.sh
  for name in GPUS MAX_REQUEUES; do
    whole_number "$name" 0
  done
  for name in NODES BLOCKS NOTICE; do
    whole_number "$name" 1
  done
  [ $# -gt 1 ] || { echo "bash scripts/slurm/$1.sh CONFIG [overrides]" >&2; exit 2; }
  exec python scripts/slurm/jobs.py "$@"
}
