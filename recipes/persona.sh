#!/usr/bin/env bash
# Make the default bot, models/persona: adapt SmolLM2-135M, which `make install` installs, to PERSONA-CHAT.
#
#   recipes/persona.sh PERSONA_CHAT.json [FOLDER]
#   DIALOGS=589 recipes/persona.sh PERSONA_CHAT.json     # a point of the learning curve over data
#
# PERSONA_CHAT.json: the published file, or another file in its layout. FOLDER: the folder for the adapter; default:
# .demo/persona/adapter. If the script is stopped and started again, it continues from the last checkpoint.
# DIALOGS: train only the first stage, on this many random dialogs, and evaluate it on 64 validation dialogs.
# benchmarks/learning_curve.py compares such folders.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$(realpath "${1:?name the JSON file of PERSONA-CHAT}") work=.demo/persona${DIALOGS:+-$DIALOGS}
folder=${2:-$work/adapter}
mkdir -p $work

train() {  # arguments: the stage's name, then flags of train.py; writes the run folder's name to $work/NAME
    local name=$1 begun=""
    shift
    if [ -f "$work/$name" ]; then return; fi
    if [ -f "$work/$name.begun" ]; then
        begun=$(find runs -path '*/checkpoints/step-*' -newer "$work/$name.begun" | sort -V | tail -n 1)
        begun=${begun%/checkpoints/*}
    fi
    [ -n "$begun" ] || touch "$work/$name.begun"
    python train.py "$@" --lora 32 --fp16 bf16 --pack_dialogs --no_token_types --max_history 30 --num_candidates 4 \
        --personality_permutations 2 --lm_coef 1.0 --train_batch_size 4 --gradient_accumulation_steps 1 \
        --valid_batch_size 4 --n_epochs 1 --warmup_ratio 0.05 --checkpoint_every 100 --seed 42 \
        ${begun:+--resume "$begun"}
    find runs -maxdepth 1 -mindepth 1 -newer "$work/$name.begun" | sort | tail -n 1 > "$work/$name"
}

# 1. PERSONA-CHAT: each row is a dialog, and each turn has three distractors, which differ between permutations
[ -f $work/chat.json ] || python recipes/mix.py $work/chat.json "$data:${DIALOGS:-}:64"
train chat --model_checkpoint smollm2 --dataset_path $work/chat.json --lr 8e-4
if [ -n "${DIALOGS:-}" ]; then
    for figure in hits@1 ppl; do
        python convai_evaluation.py --eval_type $figure --fp16 bf16 --batch_size 8 --model_checkpoint "$(cat $work/chat)" \
            --dataset_path $work/chat.json --predictions "$work/$figure.jsonl"
    done
    exit
fi

# 2. our own dialogs, which ask about the persona, mixed with some of PERSONA-CHAT's
[ -f $work/talk.json ] || python example_entry.py --convert data/persona_talk.jsonl $work/talk.json --target second \
    --train_frac 0.99
[ -f $work/mixed.json ] || python recipes/mix.py $work/mixed.json $work/talk.json data/sample_personachat.json "$data:250:64"
train talk --model_checkpoint "$(cat $work/chat)" --dataset_path $work/mixed.json --lr 3e-4

python weights.py --adapter "$(cat $work/talk)" "$folder"
python recipes/drafts.py "$folder" "$data"  # from which the chat guesses tokens
python convai_evaluation.py --eval_type all --no_sample --fp16 bf16 --batch_size 8 --model_checkpoint "$folder" \
    --dataset_path "$data"
for control in "" --no_persona; do  # needs requirements/feedback.txt
    python convai_evaluation.py --eval_type consistency --no_sample --fp16 bf16 --batch_size 32 --model_checkpoint "$folder" \
        --dataset_path $work/chat.json $control
done
