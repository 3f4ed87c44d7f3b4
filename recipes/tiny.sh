#!/usr/bin/env bash
# Train a tiny model from random weights on dialogs made from templates, until it can talk a little: a minute or two.
set -euo pipefail
cd "$(dirname "$0")/.."

data=.demo/tiny_corpus.json
python -m models.tiny_corpus --out $data
python train.py --model_checkpoint models/tiny --dataset_path $data --max_history 0 \
    --n_epochs 9 --lr 3e-3 --lm_coef 2.0 --train_batch_size 12 --gradient_accumulation_steps 1 --valid_batch_size 24
