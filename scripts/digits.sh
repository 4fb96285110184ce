#!/usr/bin/env bash
# The whole pipeline on the embedded digits: decouple, merge, sample, evaluate. No network, no GPU, under 10 minutes on
# 2 cores. Run again, it skips what is complete.
#
#   bash scripts/digits.sh                            # from the pretrained pipeline in assets/digits
#   PRETRAIN=1 bash scripts/digits.sh                 # from nothing: pretrains first (20 minutes more)
#   bash scripts/digits.sh name=mine finetune.max_steps=200    # overrides go to every step
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
export ACCELERATE_USE_CPU=true # so small a network is no faster on a GPU

if [ "${PRETRAIN:-0}" = 1 ]; then
  set -- name=digits_from_scratch model.pretrained=null "$@"
  OMP_NUM_THREADS=1 python pretrain.py "$@"
fi

# decouple; the control beside the ranges, each on one core: so small a network gains nothing from a second one
control_log=$(mktemp)
OMP_NUM_THREADS=1 python finetune.py finetune.range=continued "$@" >"$control_log" 2>&1 &
control=$!
trap 'kill $control 2>/dev/null || true; rm -f "$control_log"' EXIT
echo "the control trains beside the ranges"
OMP_NUM_THREADS=1 python finetune.py "$@"
wait $control || { cat "$control_log" >&2; exit 1; }
tail -n 1 "$control_log"

python merge.py "$@"
for model in pretrained continued ensemble merged; do
  launch sample_ddp.py sample.model=$model "$@"
done
launch evaluate.py "$@"

echo "pictures:"
folder=$(run_folder configs/digits.yaml "$@")
ls "$folder"/samples/grid-*.png "$folder"/finetuned/*/previews/*.png
