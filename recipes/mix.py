"""Write the dialogs of several data files into one: of each file all, or by FILE:N a random N of its training dialogs.

    python recipes/mix.py OUT.json FILE.json FILE.json:200
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cli import InputError, command
from corpora import read_corpus


def main() -> None:
    if len(sys.argv) < 3:
        raise InputError("name the file to write and the files to mix, FILE or FILE:N")
    draw, mixed = random.Random(42), {"train": [], "valid": []}
    for part in sys.argv[2:]:
        path, _, count = part.rpartition(":") if part.rpartition(":")[2].isdecimal() else (part, "", "")
        entries = {split: list(dialogs) for split, dialogs in read_corpus(path).items()}
        train = entries["train"]
        mixed["train"] += draw.sample(train, min(int(count), len(train))) if count else train
        mixed["valid"] += entries.get("valid", [])
    Path(sys.argv[1]).write_text(json.dumps(mixed), "utf-8")
    print(f"{sys.argv[1]}: {len(mixed['train']):,} training and {len(mixed['valid']):,} validation dialogs")


if __name__ == "__main__":
    command(main)
