#!/usr/bin/env bash
# Measure whether it helps to begin the dialog history at the same position, whatever the persona's length. The small
# GPT of recipes/small_personachat.sh learns one epoch of PERSONA-CHAT from random weights, with and without
# --history_first, with three seeds each: the table of docs/results.md. It takes about an hour on two cores.
#
#   recipes/history_first.sh TOKENIZER_FOLDER DATA.json
#
# TOKENIZER_FOLDER: a folder with openai-gpt's vocab.json and merges.txt. If started again, the script runs only what
# is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
tokenizer=$(realpath "$1") data=$(realpath "$2")

work=.demo/history_first
mkdir -p $work/gpt
cp "$tokenizer"/vocab.json "$tokenizer"/merges.txt $work/gpt/
cat > $work/gpt/config.json <<JSON
{"model_type": "openai-gpt", "vocab_size": 40478, "n_positions": 512, "n_embd": 256, "n_layer": 4, "n_head": 4,
 "initializer_range": 0.05}
JSON

for seed in 1 2 3; do
    for flag in "" --history_first; do
        log=$work/seed_$seed${flag#-}.log
        grep -qs "hits@1" "$log" && continue
        python train.py --model_checkpoint $work/gpt --dataset_path "$data" --fp16 bf16 --seed $seed $flag \
            --n_epochs 1 --lr 4e-4 --lm_coef 2.0 --num_candidates 4 \
            --train_batch_size 16 --gradient_accumulation_steps 1 --valid_batch_size 16 2> "$log.unfinished"
        mv "$log.unfinished" "$log"
    done
done
for log in $work/seed_*.log; do
    echo "$(basename "$log" .log): $(tr '\r' '\n' < "$log" | grep -o "hits@1 .*" | tail -n 1)"
done
