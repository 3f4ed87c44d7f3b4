#!/usr/bin/env bash
# Learn from preferences on EmpatheticDialogues, end to end, with a simulated annotator. A small GPT-2 is fine-tuned.
# A rule compares pairs of its replies: longer answers that ask a question win, with 10 % noise. A reward model learns
# what the rule prefers, and PPO, RLOO and DPO learn from it with three seeds each. The control replaces the rule by
# coin flips, drawn anew for each seed. benchmarks/preferences.py prints the table and draws the curves.
#
#   recipes/feedback.sh EMPATHETIC_DIALOGUES_FOLDER
#
# The tokenizer is trained on the corpus, so that nearly every word is one token: the rule counts words, and the model
# knows lengths only by positions. If the script is stopped and started again, it continues. To ask people instead of
# the rule, use `python -m feedback.annotate --web`.
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=$(realpath "${1:?name the folder of EmpatheticDialogues, ../shared/data/empatheticdialogues for example}")

work=.demo/feedback
mkdir -p $work
[ -f $work/data.json ] || python example_entry.py --convert "$corpus" $work/data.json --target second
[ -d $work/feedback-gpt2 ] || python - $work/data.json $work/feedback-gpt2 <<'PYTHON'
import json, os, sys
from tokenizers import ByteLevelBPETokenizer
dialogs, folder, end = json.load(open(sys.argv[1]))["train"], sys.argv[2] + ".making", "<|endoftext|>"
texts = {text for dialog in dialogs for turn in dialog["utterances"] for text in turn["history"] + turn["candidates"][-1:]}
tokenizer = ByteLevelBPETokenizer()
tokenizer.train_from_iterator(sorted(texts), vocab_size=8192, special_tokens=[end])
os.makedirs(folder, exist_ok=True)
tokenizer.save_model(folder)
json.dump({"model_type": "gpt2", "vocab_size": 8192, "n_positions": 256, "n_embd": 128, "n_layer": 4, "n_head": 4,
           "initializer_range": 0.05, "bos_token_id": None, "eos_token_id": None}, open(f"{folder}/config.json", "w"))
os.rename(folder, sys.argv[2])
PYTHON
data="--dataset_path $work/data.json --dataset_cache $work/cache"

# 1. a baseline
if [ ! -f $work/baseline ]; then
    begun=$(ls -td runs/*_feedback-gpt2/checkpoints/step-* 2> /dev/null | head -n 1 || true)
    python train.py --model_checkpoint $work/feedback-gpt2 $data --seed 42 --n_epochs 1 --lr 1e-3 --lm_coef 2.0 \
        --num_candidates 2 --train_batch_size 16 --gradient_accumulation_steps 1 --valid_batch_size 16 \
        --checkpoint_every 200 ${begun:+--resume "${begun%/checkpoints/*}"}
    ls -td runs/*_feedback-gpt2 | head -n 1 > $work/baseline
fi
run=$(cat $work/baseline)

# 2. all pairs among five replies per context. They come from the test split, because the policies are evaluated on the
# validation split, which neither reward models nor DPO may learn from
python -m feedback.collect --model_checkpoint "$run" $data --split test --pairs $work/pairs.jsonl --contexts 5170 \
    --replies 5 --seed 1 --max_length 30 --temperature 1 --top_p 0 --batch_size 64

policy() {  # arguments: annotator, seed, algorithm and its flags
    python -m feedback.policy --model_checkpoint "$run" $data --max_history 0 --max_length 30 --rule --seed "$2" \
        --pairs $work/pairs.jsonl --answers $work/"$1".jsonl --reward_model $work/reward_"$1" \
        --policy $work/"$1"_"$3"_"$2" --evaluate_every 10 --evaluation_contexts 192 --algorithm "${@:3}"
}

for how in rule coin; do
    for seed in 1 2 3; do
        # 3. which reply is better
        case $how in rule) who=rule draw=1 ;; coin) who=coin$seed draw=$seed ;; esac
        python -m feedback.annotate --pairs $work/pairs.jsonl --answers $work/$who.jsonl --simulate $how --seed $draw
        # 4. a reward model
        python -m feedback.reward --model_checkpoint "$run" --pairs $work/pairs.jsonl --answers $work/$who.jsonl \
            --reward $work/reward_$who --lr 3e-4 --n_epochs 1
        # 5. policies
        policy $who $seed ppo --steps 20 --lr 3e-4 --lam 1 --kl_coef 0.1 --kl_horizon 1000
        policy $who $seed rloo --steps 30 --lr 3e-4 --kl_coef 0.1 --kl_horizon 1000
        policy $who $seed dpo --steps 60 --batch_size 24 --lr 3e-4
    done
done
PYTHONPATH=. python benchmarks/preferences.py $work
