#!/usr/bin/env bash
# Decouple-then-Merge against its alternatives, from a pretrained pipeline to the table: pretrained, continued (plain
# training at equal cost), ensemble, merged, and distilled from the experts (ours).
#
#   bash scripts/compare.sh CONFIG [overrides]
#
# Called by digits.sh and cifar10_scratch.sh. Run again, it resumes and skips what is complete.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
config=$1
shift
# what distilling can't do with these settings is said now, not after the training before it
run=$(python finetune.py --path run --config "$config" "$@" finetune.range=distilled)

# decouple, the control beside the ranges: networks this small leave a GPU or a second core idle; for training over more
# GPUs set NUM_PROCESSES and finetune.micro_batch_size
count_processes
train() {
  [ "$gpus" -gt 0 ] || local -x OMP_NUM_THREADS=1 NUM_PROCESSES=1
  NUM_PROCESSES=${NUM_PROCESSES:-1} launch finetune.py --config "$config" "$@"
}
control_log=$(mktemp)
set -m # a process group of its own, which the trap can end
train "$@" finetune.range=continued $(max_minutes finetune) >"$control_log" 2>&1 &
set +m
control=$!
trap 'kill -TERM $control 2>/dev/null && wait $control || true; rm -f "$control_log"' EXIT # it saves a checkpoint
echo "the control trains beside the ranges"
train "$@" $(max_minutes finetune)
wait $control || { cat "$control_log" >&2; exit 1; }
tail -n 1 "$control_log"
trap 'rm -f "$control_log"' EXIT
complete "$(python finetune.py --path continued --config "$config" "$@")"
complete_ranges "$config" "$@"

# merge; the merged network, held to the experts
merge_ranges "$config" "$@"
train "$@" finetune.range=distilled $(max_minutes finetune)
complete "$(python finetune.py --path distilled --config "$config" "$@")"

compare_models "pretrained continued ensemble merged distilled" "$config" "$@"

pass_signals python report.py --config "$config" "$@"
echo "pictures:"
find "$run/samples" "$run/finetuned" -name 'grid-*.png' -o -path '*/previews/*.png' | sort
