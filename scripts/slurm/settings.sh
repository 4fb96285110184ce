# Settings of a cluster; sourced by the other scripts of this folder, from the repository's root.
# Set these in the environment, or in a file named by CLUSTER (configs/slurm/); the environment wins.

defaults=(
  CLUSTER=          # file with lines NAME=VALUE
  PARTITION=        # Slurm's; empty, like the next two: the cluster's default
  ACCOUNT=          # to charge
  TIME=             # limit of each job, as for sbatch: 12:00:00
  GPUS=0            # per node; 0: use the CPU
  CPUS=             # per node; empty: the cluster's default
  NODES=1           # per job
  NUM_PROCESSES=    # per node; empty: one per GPU, or 1
  BLOCKS=1          # jobs that draw from each model
  OPTIONS=          # more options of sbatch: --qos=… --constraint=…
  SETUP=            # shell command to run first: module load …; conda activate deme
  AS_IT_IS=0        # 1: use the Python that SETUP provides, make no .venv
  CONTAINER=        # srun's arguments before the command: --container-image=…, or apptainer exec --nv FILE
  NOTICE=120        # seconds before the time limit at which a job saves and requeues
  MAX_REQUEUES=20   # per job
)

names=" "
for default in "${defaults[@]}"; do
  names+="${default%%=*} "
done

# the environment wins over the file
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

set +u # SETUP may use unset variables
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
