#!/usr/bin/env bash
# The model of `make demo`, or else the default bot, on a web page. Where its pretrained base could not be installed, a tiny model, trained first if there is
# none. Flags are demo.py's.
set -euo pipefail
cd "$(dirname "$0")/.."

run=$(cat .demo/run 2> /dev/null || true)  # the model that `make demo` has made, by its name
if python -c "from pretrained import find_smollm2; find_smollm2()" 2> /dev/null; then
    [ -f "$run/config.json" ] || run=persona
    echo "The page opens $run."
    exec python demo.py --model_checkpoint "$run" --dataset_path data/sample_personachat.json --fp16 bf16 "$@"
fi
if ! [ -f "$run/model.safetensors" ] || ! [ -f .demo/tiny_corpus.json ]; then
    ./recipes/tiny.sh
    run=$(ls -td runs/*_tiny* | head -n 1)
    printf '%s\n' "$run" > .demo/run
fi
echo "The page opens $run."
exec python demo.py --model_checkpoint "$run" --dataset_path .demo/tiny_corpus.json --max_history 0 "$@"
