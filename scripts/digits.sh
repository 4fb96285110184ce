#!/usr/bin/env bash
# The whole pipeline on the embedded digits: decouple, merge, sample, evaluate. No network, no GPU, about 8 minutes on
# 2 cores. Run again, it skips what is complete.
#
#   bash scripts/digits.sh                            # from the pretrained pipeline in assets/digits
#   PRETRAIN=1 bash scripts/digits.sh                 # from nothing: pretrains first (about 25 minutes more)
#   bash scripts/digits.sh name=mine finetune.max_steps=200    # overrides go to every step
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

if [ "${PRETRAIN:-0}" = 1 ]; then
  set -- name=digits_from_scratch model.pretrained=null "$@"
  NUM_PROCESSES=1 launch pretrain.py "$@"
fi
launch finetune.py "$@"
launch finetune.py finetune.range=continued "$@"
python merge.py "$@"
for model in pretrained continued ensemble merged; do
  launch sample_ddp.py sample.model=$model "$@"
done
launch evaluate.py "$@"

echo "pictures:"
python -c '
import sys
from deme.config import load_config
folder = load_config("configs/digits.yaml", sys.argv[1:]).folder
print(*sorted(folder.glob("grid-*.png")), *sorted(folder.glob("finetuned/*/previews/*.png")), sep="\n")
' "$@"
