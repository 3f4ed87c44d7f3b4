#!/usr/bin/env bash
# Train the multi-turn system (language modelling on a mix of four corpora, five utterances, no persona) with a budget
# that suits a CPU, for a row of the table in docs/results.md.
#
#   recipes/multi_turn.sh CHECKPOINT DATA_FOLDER [CORPORA]
#
# CHECKPOINT: a model's folder, or a folder with only gpt2's vocab.json and merges.txt for a small GPT-2 with random
# weights. DATA_FOLDER: the folder of the releases, as in --data_dir; missing releases are downloaded. CORPORA: other
# corpora, separated by commas. If the script is stopped and started again, it continues. The original system
# fine-tuned GPT-2 for ten epochs:
#
#   train.py --model_checkpoint gpt2 --dataset dailydialog,empathetic_dialogues,personachat,blended_skill_talk \
#       --no_persona --mc_coef 0 --target second --max_turns 5 --n_epochs 10 --lr 2e-5 --warmup_ratio 0.1 \
#       --lr_decay polynomial --train_batch_size 8 --gradient_accumulation_steps 1
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 data=$2 corpora=${3:-dailydialog,empathetic_dialogues,personachat,blended_skill_talk}

if [ ! -e "$model/config.json" ]; then
    tokenizer=$model model=.demo/multi-turn-${corpora//,/-}
    mkdir -p "$model"
    cp "$tokenizer"/vocab.json "$tokenizer"/merges.txt "$model"
    cat > "$model/config.json" <<JSON
{"model_type": "gpt2", "vocab_size": 50257, "n_positions": 512, "n_embd": 128, "n_layer": 2, "n_head": 4,
 "bos_token_id": 50256, "eos_token_id": 50256}
JSON
fi

name=$(basename "$model")
stopped=$(ls -t runs/*_"$name"/checkpoints/*.safetensors 2> /dev/null | head -n 1 || true)
common="--data_dir $data --no_persona --mc_coef 0 --target second --max_turns 5 --valid_batch_size 32"
python train.py --model_checkpoint "$model" --dataset "$corpora" $common --seed 42 \
    --n_epochs 1 --epoch_batches 400 --train_batch_size 8 --gradient_accumulation_steps 1 \
    --lr 2e-3 --warmup_ratio 0.1 --lr_decay polynomial --checkpoint_every 100 ${stopped:+--resume "$stopped"}
[[ $corpora == *,* ]] || exit 0
run=$(ls -td runs/*_"$name" | head -n 1)
for corpus in ${corpora//,/ }; do  # validate a mix on each corpus
    echo "$corpus:"
    python train.py --model_checkpoint "$run" --dataset $corpus $common --n_epochs 0
done
