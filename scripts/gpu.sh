#!/usr/bin/env bash
# What only a GPU can tell, most valuable first, in pieces of under 9 minutes each, made for one H100 or H200 in 28 minutes:
# checks against the CPU, sampling, training and memory (tables in benchmarks/README.md), CIFAR-10 from nothing.
#
#   bash scripts/gpu.sh --data FOLDER        # uoft-cs/cifar10's parquet files, for the last piece, which is else left out
#   bash scripts/gpu.sh --quick              # each piece small and on the CPU: that no GPU minute goes to a typo
#   bash scripts/gpu.sh --data FOLDER data.image_column=image    # overrides go to the last piece
#   MAX_MINUTES=9 bash scripts/gpu.sh …      # begins no piece that may take longer than what is left
#
# Run again, it goes on: a piece that is complete leaves a mark in OUT (default runs/gpu), beside what it said. It takes the
# Python that it finds, without a network, and names the wheels that this one lacks.
set -euo pipefail
cd "$(dirname "$0")/.."
data= quick= overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    --data) [ $# -gt 1 ] || { echo "--data: names no folder" >&2; exit 2; }; data=$2; shift ;;
    --quick) quick=--quick ;;
    *=*) overrides+=("$1") ;;
    *) echo "$1: not --data FOLDER, --quick or an override" >&2; exit 2 ;;
  esac
  shift
done
[ -z "$data" ] || [ -d "$data" ] || { echo "--data $data: no such folder" >&2; exit 2; }
missing=$(python scripts/missing_wheels.py | tr '\n' ' ')
[ -z "$missing" ] || { echo "this Python lacks: $missing" >&2; exit 2; }
export AS_IT_IS=1
. scripts/setup.sh
out=${OUT:-runs/gpu}
mkdir -p "$out"
device=(--device cuda)
if [ -n "$quick" ]; then
  device=(--quick)
  out=$out/quick
  mkdir -p "$out"
  export ACCELERATE_USE_CPU=true
fi

# piece NAME MINUTES COMMAND…: run it, unless that is done, for at most so many minutes
piece() {
  local name=$1 minutes=$2 status=0
  shift 2
  if [ -e "$out/$name.complete" ]; then
    echo "$name is complete"
    return
  fi
  if [ -n "${MAX_MINUTES:-}" ] && awk -v "left=$(minutes_left)" "BEGIN { exit left >= $minutes }"; then
    resume_later
  fi
  echo "$name: at most $minutes minutes, $out/$name.log"
  pass_signals timeout "${minutes}m" "$@" >"$out/$name.log" 2>&1 || status=$?
  tail -n 40 "$out/$name.log"
  case $status in
    0) grep -q "the same command resumes" "$out/$name.log" || touch "$out/$name.complete" ;;
    124) echo "$name: its $minutes minutes are over; the same command goes on" ;;
    130 | 143) exit $status ;;
    *) failed+=" $name" ;;
  esac
}
failed=

# cifar10: from pretraining to the table, resumed by the next run where its time is up
cifar10() {
  local options=()
  [ -z "$quick" ] || options=(data.held_out_images=4 pretrain.max_steps=2 pretrain.batch_size=8 finetune.max_steps=1
    finetune.batch_size=8 distill.max_steps=1 sample.num_images=24 sample.num_inference_steps=2 evaluate.blocks=2
    evaluate.classifier_epochs=1 merge.coefficients=null {pretrain,finetune,sample}.mixed_precision=no)
  options=("data.name='${data//\'/\'\'}'" "output_dir='${out//\'/\'\'}'" ${options[@]+"${options[@]}"} ${overrides[@]+"${overrides[@]}"})
  piece cifar10-scratch 8.5 env MAX_MINUTES=8 bash scripts/cifar10_scratch.sh "${options[@]}"
}

piece checks 5 python benchmarks/gpu_checks.py "${device[@]}"
piece sampling 8 python benchmarks/sampling.py "${device[@]}"
piece training 6 python benchmarks/training.py "${device[@]}"
piece memory 4 python benchmarks/memory.py "${device[@]}"
[ -z "$data" ] || cifar10
[ -z "$failed" ] || { echo "failed:$failed; what they said is in $out" >&2; exit 1; }
