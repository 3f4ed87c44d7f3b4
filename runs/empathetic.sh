#!/usr/bin/env bash
# A small GPT from random weights on EmpatheticDialogues: its row of the table in docs/results.md.
#
#   runs/empathetic.sh TOKENIZER_FOLDER DATA_FOLDER
#
# TOKENIZER_FOLDER: a folder with openai-gpt's vocab.json and merges.txt. DATA_FOLDER: where the release is, as for
# --data_dir; if it is not there, it is downloaded.
exec "$(dirname "$0")/multi_turn.sh" "$1" "$2" empathetic_dialogues
