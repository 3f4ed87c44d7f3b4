#!/usr/bin/env bash
# As runs/multi_turn.sh, whose arguments it takes, on DailyDialog alone: a row of the table in docs/results.md.
#
#   runs/dailydialog.sh CHECKPOINT DATA_FOLDER
exec "$(dirname "$0")/multi_turn.sh" "$1" "$2" dailydialog
