#!/usr/bin/env bash
# CIFAR-10 at 32×32 from scratch on one GPU in SECONDS: pretrain for as long as fits, train four experts and the control
# side by side, search, distil, and print one table of all models on fresh seeds (configs/cifar10_first.yaml).
#
#   bash scripts/cifar10_first.sh SECONDS FOLDER data.name=PARQUET [overrides]     # FOLDER gets results.tgz, summary.md
#   QUICK=1 bash scripts/cifar10_first.sh SECONDS FOLDER [overrides]               # a few steps of each, to see that it runs
#
# FOLDER is updated after every stage, so a time limit loses only the current stage. Networks, logs and decoded images are
# in RUNS (default runs/gpu); the same command with the same RUNS resumes. It uses the Python on the PATH.
set -uo pipefail
cd "$(dirname "$0")/.."
seconds=${1:?SECONDS} back=${2:?FOLDER}
shift 2
runs=${RUNS:-runs/gpu}
python=$(command -v python || command -v python3)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-3} HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 PYTHONUNBUFFERED=1
arguments=(--config configs/cifar10_first.yaml "output_dir=$runs" "$@")
run=$("$python" pretrain.py --path run_folder "${arguments[@]}") || exit
logs=$run/logs
mkdir -p "$logs" "$back"
rest=190 probe=150 # seconds for all that comes after pretraining (an estimate for an H100), steps of the probe
[ -z "${QUICK:-}" ] || probe=2

left() { # left [KEPT]: how many seconds are left, less those that are kept for later
  echo $((seconds - SECONDS - ${1:-0}))
}

pack() { # logs, records, tables and pictures; no weights, no images
  local log table
  for log in "$logs/search.log" "$logs/search-distilled.log"; do # the second has a row more
    [ ! -f "$log" ] || table=$(grep '^| ' "$log" || echo "${table:-}")
  done
  { echo "# CIFAR-10 at 32×32 in $SECONDS seconds"; cat "$logs/stages.txt"; "$python" scripts/first_numbers.py converged "$run"
    echo "${table:-}"; } >"$back/summary.md" 2>/dev/null
  (cd "$run" && find . -type f -size -3M \( -name '*.log' -o -name '*.json' -o -name '*.jsonl' -o -name '*.yaml' \
    -o -name '*.txt' -o -path './plots/*.png' \) -print0 | tar --null -T - -czf - 2>/dev/null) >"$back/results.tmp" &&
    mv "$back/results.tmp" "$back/results.tgz"
}

stage() { # stage NAME KEPT COMMAND…: run it within what is left, less the seconds that are KEPT for later stages
  local name=$1 limit status=0 start=$SECONDS child
  limit=$(left "$2")
  shift 2
  if [ "$limit" -lt 1 ]; then
    echo "$name: left out, no time is left" | tee -a "$logs/stages.txt"
    return 1
  fi
  timeout -k 5 "$limit" "$python" "$@" >"$logs/$name.log" 2>&1 &
  child=$!
  trap 'kill $child 2>/dev/null; exit 143' TERM INT # a trap runs during wait, not during a command
  wait $child || status=$?
  trap 'exit 143' TERM INT
  echo "$name: $((SECONDS - start)) s, until $SECONDS s, status $status" | tee -a "$logs/stages.txt"
  [ $status = 0 ] || tail -c 400 "$logs/$name.log" | tr '\r' '\n' | tail -n 3
  return $status
}

finish() { # end what still runs beside, and pack
  local running
  running=$(jobs -p)
  [ -z "$running" ] || kill $running 2>/dev/null
  pack
}

: >"$logs/stages.txt"
trap finish EXIT
trap 'exit 143' TERM INT
# --- a probe tells how many steps fit; a run that goes on keeps its number
if [ ! -f "$run/steps" ]; then
  stage probe 20 pretrain.py "${arguments[@]}" name=probe "pretrain.max_steps=$probe" pretrain.lr_warmup_steps=1 \
    data.held_out_images=0 || exit 1
  steps=$("$python" scripts/first_numbers.py steps "$runs/probe" "$(left $rest)") || exit 1
  [ -z "${QUICK:-}" ] || steps=4
  echo "$steps" >"$run/steps"
fi
arguments+=("pretrain.max_steps=$(cat "$run/steps")")
echo "pretraining: $(cat "$run/steps") steps" | tee -a "$logs/stages.txt"
# --- the classifier and the data's statistics, beside the pretraining
stage statistics 20 evaluate.py "${arguments[@]}" "evaluate.samples=[]" &
statistics=$!
stage pretrain $((rest - 40)) pretrain.py "${arguments[@]}" || exit 1
pack
# --- the experts and the control, side by side
trainings=()
for range in 0 1 2 3 continued; do
  stage "finetune-$range" 60 finetune.py "${arguments[@]}" "finetune.range=$range" &
  trainings+=($!)
done
failed=
for training in "${trainings[@]}" $statistics; do
  wait "$training" || failed=1
done
[ -z "$failed" ] || exit 1
pack
# --- coefficients by the distance itself, then the table on fresh seeds; images stay in memory
stage search 2 search.py "${arguments[@]}" || exit 1
pack
# --- one row more: the merged network, held to all experts
stage merge 30 merge.py "${arguments[@]}" && stage distill 20 finetune.py "${arguments[@]}" finetune.range=distilled &&
  stage search-distilled 2 search.py "${arguments[@]}"
pack
cat "$back/summary.md"
