#!/usr/bin/env bash
# Open the default bot on a web page. If its pretrained base is not installed, open a tiny model, which is trained first
# if necessary. The flags are those of demo.py.
set -euo pipefail
cd "$(dirname "$0")/.."

if python -c "from pretrained import find_smollm2; find_smollm2()" 2> /dev/null; then
    echo "The page opens persona."
    exec python demo.py --model_checkpoint persona --dataset_path data/sample_personachat.json --fp16 bf16 "$@"
fi
run=$(cat .demo/run 2> /dev/null || true)  # the tiny model of an earlier call
if ! [ -f "$run/model.safetensors" ] || ! [ -f .demo/tiny_corpus.json ]; then
    ./recipes/tiny.sh
    run=$(ls -td runs/*_tiny* | head -n 1)
    printf '%s\n' "$run" > .demo/run
fi
echo "The page opens $run."
exec python demo.py --model_checkpoint "$run" --dataset_path .demo/tiny_corpus.json --max_history 0 "$@"
