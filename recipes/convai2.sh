#!/usr/bin/env bash
# The recipe of the published figures (hits@1 over 79, perplexity 20.5, F1 16.5) on PERSONA-CHAT, then all three metrics.
#
#   recipes/convai2.sh [CHECKPOINT [DATA_FOLDER]]
#
# CHECKPOINT: openai-gpt by default; any other, or a model's folder. DATA_FOLDER: where personachat/ with the published
# JSON is; by default it is downloaded. In one process, whose batch of 16 turns is that of the eight GPUs of 2019.
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-openai-gpt} data=${2:+$2/personachat/personachat_self_original.json}

python train.py --model_checkpoint "$model" --dataset_path "$data" --max_history 2 --n_epochs 1 --num_candidates 4 \
    --personality_permutations 2 --lm_coef 2.0 --train_batch_size 16 --gradient_accumulation_steps 4 --valid_batch_size 16
run=$(ls -td runs/*_"$(basename "$model")"* | head -n 1)
python convai_evaluation.py --eval_type all --model_checkpoint "$run" --dataset_path "$data" --seed 42
