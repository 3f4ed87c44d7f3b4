#!/usr/bin/env bash
# Train with the recipe of the published figures (hits@1 over 79, perplexity 20.5, F1 16.5) on PERSONA-CHAT, then
# measure all three.
#
#   recipes/convai2.sh [CHECKPOINT [DATA]]
#   recipes/convai2.sh models/tiny data/sample_personachat.json     # see every step work, in two minutes
#
# CHECKPOINT: a model's name or folder; default: openai-gpt. DATA: the folder that contains personachat/ with the
# published JSON, or a file; by default the published file is downloaded. One process uses the 16 turns per batch that
# eight GPUs had in 2019.
set -euo pipefail
data=${2:+$(realpath "$2")}
cd "$(dirname "$0")/.."
model=${1:-openai-gpt}
if [ -d "$data" ]; then data=$data/personachat/personachat_self_original.json; fi

python train.py --model_checkpoint "$model" --dataset_path "$data" --max_history 2 --n_epochs 1 --num_candidates 4 \
    --personality_permutations 2 --lm_coef 2.0 --train_batch_size 16 --gradient_accumulation_steps 4 --valid_batch_size 16
run=$(ls -td runs/*_"$(basename "$model")"* | head -n 1)
python convai_evaluation.py --eval_type all --model_checkpoint "$run" --dataset_path "$data" --seed 42
