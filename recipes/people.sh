#!/usr/bin/env bash
# Learn from people's ratings of replies. The default bot becomes a reward model that knows which of two replies people
# rate higher. RLOO follows this reward; DPO learns from the pairs themselves, and from pairs of the default bot's own
# replies of which the reward model prefers one. Each trains with three seeds. benchmarks/people.py compares their
# replies with the default bot's, also by judges that have learnt nothing from these ratings.
#
#   recipes/people.sh FOLDER_OF_RATINGS PERSONA_CHAT.json
#
# FOLDER_OF_RATINGS has persona_zhao, dailydialog_zhao, usr_personachat, convai2_grade, dailydialog_grade and
# convai2_wild, as .jsonl files that feedback.ratings reads. If the script is stopped and started again, it continues.
set -euo pipefail
cd "$(dirname "$0")/.."
human=$(realpath "${1:?name the folder of ratings}") data=$(realpath "${2:?name the JSON file of PERSONA-CHAT}")

work=.demo/people
mkdir -p $work

# 1. Measure how well scorers agree with people, and keep the scores of all replies
if [ ! -f $work/scores.jsonl ]; then
    rm -f $work/scores.unfinished
    python -m feedback.judge --fp16 bf16 --model_checkpoint persona --scores $work/scores.unfinished --data \
        "$human"/{usr_personachat,persona_zhao,convai2_grade,dailydialog_zhao,dailydialog_grade}.jsonl
    mv $work/scores.unfinished $work/scores.jsonl
fi

# 2. Pair replies to the same context whose ratings differ by a point or more
for name in persona_zhao dailydialog_zhao usr_personachat convai2_grade; do
    python -m feedback.ratings --data "$human/$name.jsonl" --margin 1 --pairs $work/$name.jsonl
done
cat $work/{persona_zhao,dailydialog_zhao,usr_personachat,convai2_grade}.jsonl > $work/pairs.jsonl

# 3. Train a reward model
low_rank="--model_checkpoint persona --pairs $work/pairs.jsonl --lora 16 --fp16 bf16"
python -m feedback.reward $low_rank --reward $work/reward --n_epochs 2 --train_batch_size 32 --lr 3e-4 --save_every 50

# 4. Let the reward model choose among replies of the default bot
python -m feedback.collect --model_checkpoint persona --dataset_path "$data" --dataset_cache $work/cache --split train \
    --contexts 384 --replies 4 --fp16 bf16 --pairs $work/own.jsonl
python -m feedback.annotate --pairs $work/own.jsonl --answers $work/own_answers.jsonl --reward_model $work/reward \
    --margin 1 --fp16 bf16

# 5. Train policies
policy() {  # arguments: name, seed, further flags
    python -m feedback.policy $low_rank --reward_model $work/reward --dataset_path "$data" --dataset_cache $work/cache \
        --policy $work/"$1"_"$2" --seed "$2" --evaluation_contexts 16 --evaluate_every 20 --save_every 20 "${@:3}"
}
for seed in 1 2 3; do
    policy rloo $seed --algorithm rloo --steps 20 --batch_size 16 --lr 3e-4 --kl_coef 0.1 --kl_target 0
    policy dpo $seed --algorithm dpo --steps 40 --batch_size 8 --lr 2e-4
    policy dpo_own $seed --algorithm dpo --steps 60 --batch_size 8 --lr 2e-4 --pairs $work/own.jsonl \
        --answers $work/own_answers.jsonl
done

# 6. Print both tables
PYTHONPATH=. python benchmarks/people.py $work "$human" "$data"
