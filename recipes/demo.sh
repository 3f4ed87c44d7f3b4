#!/usr/bin/env bash
# Evaluate the default bot, fine-tune it a little further, evaluate it again and talk to it, in a few minutes. If the
# pretrained base is not installed, recipes/tiny.sh trains a tiny model from random weights instead.
set -euo pipefail
cd "$(dirname "$0")/.."

if python -c "from pretrained import find_smollm2; find_smollm2()" 2> /dev/null; then
    model=persona data=data/sample_personachat.json

    echo "== 1 of 3: the default bot learns from the sample's training dialogs, validated before and after"
    python train.py --model_checkpoint $model --lora 32 --lr 2e-4 --fp16 bf16 --dataset_path $data --pack_dialogs \
        --max_history 30 --num_candidates 4 --lm_coef 2.0 --train_batch_size 4 --gradient_accumulation_steps 1 \
        --valid_batch_size 4 --n_epochs 1 --epoch_batches 24 --eval_before_start
    run=$(ls -td runs/*_$model* | head -n 1)
    echo "== 2 of 3: its replies to the validation dialogs, compared with those of people"
    python convai_evaluation.py --eval_type f1 --model_checkpoint "$run" --dataset_path $data --fp16 bf16 --no_sample
    flags=""
else
    echo "== The pretrained base is not installed (make install); a tiny model learns from random weights instead"
    data=.demo/tiny_corpus.json flags="--max_history 0"
    ./recipes/tiny.sh
    run=$(ls -td runs/*_tiny* | head -n 1)
    python convai_evaluation.py --eval_type all --model_checkpoint "$run" --dataset_path $data $flags
fi

echo "== 3 of 3: six lines, with a persona that the bot has not seen"
printf '%s\n' "hi ! how are you today ?" "what do you do for a living ?" "do you have any pets ?" "what is your favorite food ?" \
    "do you play an instrument ?" "it was nice to meet you ." |
    python interact.py --model_checkpoint "$run" $flags --seed 42 --personality "i work as a gardener in bristol .
i have a cat called biscuit .
i play the trumpet in a jazz band .
my favorite food is mushroom soup ."

echo "Talk to it yourself: python interact.py --model_checkpoint $run --dataset_path $data $flags"
echo "In the browser: make web. Your own persona: --personality FILE. Your own dialogs: docs/usage.md."
