#!/usr/bin/env bash
# From nothing to a bot in two minutes on a laptop: a tiny model is trained, evaluated and talked to.
# Its dialogs are made of templates so that a model this small can learn from them; see models/tiny_corpus.py.
set -euo pipefail
cd "$(dirname "$0")/.."

data=.demo/tiny_corpus.json
./recipes/tiny.sh
run=$(ls -td runs/*_tiny* | head -n 1)

for metric in hits@1 ppl f1; do
    python convai_evaluation.py --eval_type $metric --model_checkpoint "$run" --dataset_path $data --max_history 0
done

printf '%s\n' "hi ! what do you do for a living ?" "do you have any pets ?" "cool . what is your favorite food ?" |
    python interact.py --model_checkpoint "$run" --max_history 0 --seed 42 --personality "i work as a baker .
i have two dogs at home .
my favorite food is sushi .
i listen to jazz a lot ."

echo "Talk to it yourself: python interact.py --model_checkpoint $run --dataset_path $data --max_history 0"
