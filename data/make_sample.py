"""Convert the dialogs in data/sample/ to data/sample_personachat.json, in PERSONA-CHAT's JSON format.

The dialogs, 72 for training and 18 for validation, were written by hand for this project: two people, each with a
persona, get to know each other. Both sides become entries. Validation turns have 19 distractors, as in PERSONA-CHAT;
training turns have seven, which keeps the file small.

    python data/make_sample.py [--out data/sample_personachat.json]
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from example_entry import add_distractors  # noqa: E402
from readers import read_any  # noqa: E402

CANDIDATES = {"train": 8, "valid": 20}  # per turn, including the right reply


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "sample_personachat.json", help="default: %(default)s")
    args = parser.parse_args()
    parts = []
    for split, entries in read_any(HERE / "sample").items():
        entries = list(entries)
        add_distractors(entries, "random", seed=42)
        for turn in (turn for entry in entries for turn in entry["utterances"]):
            del turn["candidates"][:-CANDIDATES[split]]
        # One entry per line, so that a diff shows which dialogs have changed.
        lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in entries)
        parts.append(f'"{split}": [\n{lines}\n]')
    args.out.write_text("{\n" + ",\n".join(parts) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
