#!/usr/bin/env bash
# The demo's model: tiny, trained on the embedded sample in a minute or two.
set -euo pipefail
cd "$(dirname "$0")/.."

python train.py --model_checkpoint models/tiny --dataset_path data/sample_personachat.json --max_history 0 \
    --n_epochs 16 --lr 2e-3 --lm_coef 2.0 --train_batch_size 12 --gradient_accumulation_steps 1 --valid_batch_size 24
