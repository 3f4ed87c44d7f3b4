#!/usr/bin/env bash
# Run recipes/multi_turn.sh on EmpatheticDialogues alone, for a row of the table in docs/results.md.
#
#   recipes/empathetic.sh CHECKPOINT DATA_FOLDER
exec "$(dirname "$0")/multi_turn.sh" "$1" "$2" empathetic_dialogues
