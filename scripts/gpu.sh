#!/usr/bin/env bash
# Two measurements on one H100 or H200 without a network, 12 minutes together: benchmarks/gpu_first.py (correctness and
# speed), then scripts/cifar10_first.sh (what merging gains on CIFAR-10).
#
#   bash scripts/gpu.sh --prepare WHEELS [--has FILE] [--python 3.12]      # before, with a network; prints the two calls
#   bash scripts/gpu.sh first --output FOLDER [--wheels WHEELS] [--seconds 275]
#   bash scripts/gpu.sh cifar10 --output FOLDER --data PARQUET [--wheels WHEELS] [--seconds 405] [overrides]
#   bash scripts/gpu.sh --quick [first | cifar10] [--output FOLDER]        # both or one, small and on the CPU
#
# --prepare downloads into WHEELS the packages that the GPU machine lacks; FILE is the output of
# `python3 -m pip list --format=freeze` there. PARQUET is a folder with uoft-cs/cifar10's train-*.parquet. Results are a few
# small files in FOLDER (default runs/gpu-results); networks and caches stay in RUNS (default runs/gpu). The calls use the
# Python on the PATH, with the wheels before its own packages.
set -euo pipefail
cd "$(dirname "$0")/.."
wrong() { echo "scripts/gpu.sh: error: $*" >&2; exit 2; }
call= quick= output=runs/gpu-results wheels= seconds= data= has= version=3.12 overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    first | cifar10) call=$1 ;;
    --quick) quick=1 ;;
    --prepare | --output | --wheels | --seconds | --data | --has | --python)
      [ $# -gt 1 ] || wrong "$1 needs a value"
      case $1 in
        --prepare) call=prepare wheels=$2 ;;
        --output) output=$2 ;;
        --wheels) wheels=$2 ;;
        --seconds) seconds=$2 ;;
        --data) data=$2 ;;
        --has) has=$2 ;;
        --python) version=$2 ;;
      esac
      shift
      ;;
    *=*) overrides+=("$1") ;;
    *) wrong "$1 is not first, cifar10, --prepare, --quick, an option or an override" ;;
  esac
  shift
done
[ -n "$call$quick" ] || wrong "say first, cifar10, --prepare WHEELS or --quick"
case ${seconds:-1} in *[!0-9]* | 0*) wrong "--seconds $seconds: must be a whole number above 0" ;; esac
[ -z "$has" ] || [ -f "$has" ] || wrong "--has $has: no such file"
[ -z "$data" ] || [ -d "$data" ] || wrong "--data $data: no such folder"
[ "$call" != cifar10 ] || [ -n "$data$quick" ] || wrong "cifar10 needs --data PARQUET"
python=$(command -v python || command -v python3) || wrong "no python or python3 in PATH"

# fetch NAME==VERSION: its wheel into $wheels, in pure Python where there is one, as that is the smallest
fetch() {
  local options=(-q --no-deps --only-binary=:all: --python-version "$version" --dest "$wheels") minor platforms=()
  "$python" -m pip download "${options[@]}" --implementation py --abi none --platform any "$1" 2>/dev/null && return
  for minor in $(seq 17 39); do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
  "$python" -m pip download "${options[@]}" --platform manylinux2014_x86_64 "${platforms[@]}" "$1"
}

prepare() {
  local package
  mkdir -p "$wheels"
  "$python" scripts/missing_wheels.py ${has:+--has "$has"} | while read -r package; do
    fetch "$package"
    echo "$package"
  done
  echo "$(du -sh "$wheels" | cut -f1) in $wheels; then, on the machine with the GPU:"
  echo "bash scripts/gpu.sh first --wheels $wheels --output FOLDER"
  echo "bash scripts/gpu.sh cifar10 --wheels $wheels --output FOLDER --data PARQUET"
}

# use_wheels: put them in front of this Python's packages, or say what is missing
use_wheels() {
  local missing
  if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  fi
  missing=$("$python" scripts/missing_wheels.py | tr '\n' ' ')
  [ -z "$missing" ] || echo "scripts/gpu.sh: this Python lacks $missing(--prepare fetches them)" >&2
}

if [ "$call" = prepare ]; then
  prepare
  exit
fi
use_wheels
first=(--seconds "$((${seconds:-275} - SECONDS - 5))")
within=$((${seconds:-405} - SECONDS - 5))
if [ -n "$quick" ]; then
  first=(--quick)
  within=100000
  unet="{in_channels: 3, out_channels: 3, layers_per_block: 1, norm_num_groups: 8, block_out_channels: [8, 16, 16, 16],
    down_block_types: [DownBlock2D, AttnDownBlock2D, DownBlock2D, DownBlock2D],
    up_block_types: [UpBlock2D, UpBlock2D, AttnUpBlock2D, UpBlock2D]}"
  small=({pretrain,finetune,sample}.mixed_precision=no {pretrain,finetune}.batch_size=8 "pretrain.unet=${unet//$'\n'/}"
    data.resolution=8 data.held_out_images=64 pretrain.held_out_every=1 {pretrain,finetune}.log_every=1
    {finetune,distill}.max_steps=2 sample.batch_size=32 sample.num_inference_steps=2 search.trials=4
    search.{num_images=32,control_images=64,finalist_images=48,report_images=60} evaluate.classifier_precision=no
    evaluate.classifier_epochs=1)
  [ -n "$data" ] || small+=(data.image_column=image) # of the digits
  overrides=("${small[@]}" ${overrides[@]+"${overrides[@]}"})
  data=${data:-digits}
  export QUICK=1 RUNS=${RUNS:-runs/gpu-quick} ACCELERATE_USE_CPU=true OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
[ "$call" = cifar10 ] || "$python" benchmarks/gpu_first.py "${first[@]}" --output "$output"
[ "$call" = first ] || bash scripts/cifar10_first.sh "$within" "$output" "data.name='${data//\'/\'\'}'" \
  ${overrides[@]+"${overrides[@]}"}
