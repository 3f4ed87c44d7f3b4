"""One annotated entry of the data format; run with a file, a check of that file.

    python example_entry.py                prints the entry below as JSON
    python example_entry.py MY_DATA.json   says what the file holds, or what is wrong with it and where
"""

import argparse
import json

from corpora import command, read_corpus, require_split

# A dialog of two people, A and the bot, written from the bot's side. Each of the bot's turns is one element of
# "utterances": the dialog up to that turn, and what could be said next.
EXAMPLE_ENTRY = {
    # Who the bot is: short first-person sentences. The reply should follow from them.
    "personality": [
        "i keep bees on the roof of my house .",
        "i teach chemistry at a night school .",
        "my brother is a sailor .",
        "i never drink coffee after lunch .",
    ],
    "utterances": [
        {
            # What has been said so far, oldest first. A began and spoke last, so the number of utterances is odd.
            "history": ["hello there ! how was your day ?"],
            # What could be said next: distractors said in other dialogs, and LAST the reply that was really given.
            "candidates": [
                "my car is red , what color is yours ?",
                "we went to the lake with our cousins last summer .",
                "long ! i looked after my bees , and now i have a class to teach .",
            ],
        },
        {
            # The same dialog one exchange later: the history has grown by the bot's reply and A's answer.
            "history": [
                "hello there ! how was your day ?",
                "long ! i looked after my bees , and now i have a class to teach .",
                "at this hour ? do you want a coffee first ?",
            ],
            # The number of candidates may differ from turn to turn; one, the reply alone, is enough to train on.
            "candidates": [
                "no , i do not have any pets .",
                "thanks , but coffee this late would keep me up all night .",
            ],
        },
    ],
}


def describe(path: str) -> None:
    """Check the data file at ``path`` and print what it holds, a line a split. Raises `InputError`."""
    corpus = read_corpus(path)
    for split in ("train", "valid"):
        require_split(corpus, split, path)
    for split, entries in corpus.items():
        if not entries:
            print(f"{split}: empty")
            continue
        turns = [turn for entry in entries for turn in entry["utterances"]]
        candidates = sorted({len(turn["candidates"]) for turn in turns})
        even = sum(len(turn["history"]) % 2 == 0 for turn in turns)
        personas = sum(bool(entry.get("personality")) for entry in entries)
        span = " to ".join(map(str, dict.fromkeys((candidates[0], candidates[-1]))))
        print(f"{split}: {len(entries):,} dialogs ({personas:,} with a persona), {len(turns):,} turns, "
              f"{span} candidates a turn")
        if even:
            print(f"  note: {even:,} turns have a history of even length: the bot's own words come last in it")
    print(f"{path}: well-formed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="a .json or .json.gz data file to check")
    args = parser.parse_args()
    if args.file:
        describe(args.file)
    else:
        print(json.dumps(EXAMPLE_ENTRY, indent=1))


if __name__ == "__main__":
    command(main)
