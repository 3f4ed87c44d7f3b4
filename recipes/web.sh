#!/usr/bin/env bash
# The default bot on a web page. Where its pretrained base could not be installed, a tiny model, trained first if there is
# none. Flags are demo.py's.
set -euo pipefail
cd "$(dirname "$0")/.."

if python -c "from pretrained import find_smollm2; find_smollm2()" 2> /dev/null; then
    exec python demo.py --model_checkpoint persona --dataset_path data/sample_personachat.json --fp16 bf16 "$@"
fi
newest() { ls -t runs/*_tiny*/model.safetensors 2> /dev/null | head -n 1; }
[ -n "$(newest)" ] && [ -f .demo/tiny_corpus.json ] || ./recipes/tiny.sh
exec python demo.py --model_checkpoint "$(dirname "$(newest)")" --dataset_path .demo/tiny_corpus.json \
    --max_history 0 "$@"
