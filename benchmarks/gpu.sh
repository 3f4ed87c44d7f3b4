#!/usr/bin/env bash
# Measure everything on a GPU in at most eight minutes, and write the figures into RESULTS.md.
#
#   benchmarks/gpu.sh [FLAGS]      # FLAGS: see benchmarks/gpu.py
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=.
timeout 600 python benchmarks/gpu.py "$@" || true
python benchmarks/write_results.py
