#!/usr/bin/env bash
# Train a small GPT from random weights on PERSONA-CHAT, for the figures of docs/results.md. It takes about half an hour
# on two cores.
#
#   recipes/small_personachat.sh TOKENIZER_FOLDER DATA.json
#
# TOKENIZER_FOLDER: a folder with openai-gpt's vocab.json and merges.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
tokenizer=$1 data=$2

model=.demo/small-gpt
mkdir -p $model
cp "$tokenizer"/vocab.json "$tokenizer"/merges.txt $model/
cat > $model/config.json <<JSON
{"model_type": "openai-gpt", "vocab_size": 40478, "n_positions": 512, "n_embd": 256, "n_layer": 4, "n_head": 4,
 "initializer_range": 0.05}
JSON

python train.py --model_checkpoint $model --dataset_path "$data" --fp16 bf16 --seed 42 \
    --n_epochs 3 --lr 4e-4 --lm_coef 2.0 --num_candidates 4 \
    --train_batch_size 16 --gradient_accumulation_steps 1 --valid_batch_size 16
run=$(ls -td runs/*_small-gpt* | head -n 1)
for metric in hits@1 ppl f1; do
    python convai_evaluation.py --eval_type $metric --model_checkpoint "$run" --dataset_path "$data" --seed 42
done
