#!/usr/bin/env bash
# The page with the demo's model, which is trained first if there is none. Flags are demo.py's.
set -euo pipefail
cd "$(dirname "$0")/.."

newest() { ls -t runs/*_tiny*/model.safetensors 2> /dev/null | head -n 1; }
[ -n "$(newest)" ] && [ -f .demo/tiny_corpus.json ] || ./recipes/tiny.sh
exec python demo.py --model_checkpoint "$(dirname "$(newest)")" --dataset_path .demo/tiny_corpus.json \
    --max_history 0 "$@"
