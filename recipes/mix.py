"""Write the dialogs of several data files into one file.

    python recipes/mix.py OUT.json FILE.json FILE.json:200 FILE.json:200:64

FILE takes all dialogs of a file, and FILE:N takes N random training dialogs and all validation dialogs. FILE:N:M also
takes only the first M validation dialogs. FILE::M takes all training dialogs and the first M validation dialogs.
"""

import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cli import InputError, command
from corpora import read_corpus


def main() -> None:
    if len(sys.argv) < 3:
        raise InputError("name the file to write and the files to mix, FILE, FILE:N or FILE:N:M")
    draw, mixed = random.Random(42), {"train": [], "valid": []}
    for part in sys.argv[2:]:
        path, train_count, valid_count = re.fullmatch(r"(.*?)(?::(\d*))?(?::(\d+))?", part).groups()
        entries = {split: list(dialogs) for split, dialogs in read_corpus(path).items()}
        train = entries["train"]
        mixed["train"] += draw.sample(train, min(int(train_count), len(train))) if train_count else train
        mixed["valid"] += entries.get("valid", [])[: int(valid_count) if valid_count else None]
    Path(sys.argv[1]).write_text(json.dumps(mixed), "utf-8")
    print(f"{sys.argv[1]}: {len(mixed['train']):,} training and {len(mixed['valid']):,} validation dialogs")


if __name__ == "__main__":
    command(main)
