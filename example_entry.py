"""One annotated entry of the data format; run with a file, a check of that file, or its conversion to the format.

    python example_entry.py                          prints the entry below as JSON
    python example_entry.py MY_DATA.json             says what the file holds, or what is wrong with it and where
    python example_entry.py --convert IN OUT.json    writes OUT.json, in this format, of dialogs in another one
"""

import argparse
import gzip
import json
import logging
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import InputError, command, printable, whole_number
from corpora import read_corpus, require_split
from dialogs import DialogNumbers, combine_corpora
from distractors import draw_distractors
from readers import add_reading_flags, convertible_layout, read_any
from releases import RELEASES

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
    try:
        corpus = read_corpus(path)
    except InputError:
        if name := convertible_layout(Path(path)):
            raise InputError(f"{path}: is not in the data format but looks like {name}; convert it with --convert "
                             f"{path} OUT.json, or train on it as it is") from None
        raise
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
        print(f"{split}: {len(entries):,} entries ({personas:,} with a persona), {len(turns):,} turns, "
              f"{span} candidates a turn")
        if alone := sum(len(turn["candidates"]) == 1 for turn in turns):
            print(f"  note: {alone:,} turns have one candidate, the reply: nothing to choose, so hits@1 says nothing")
        if even:
            print(f"  note: {even:,} turns have a history of even length: the bot's own words come first in it")
    print(f"{printable(str(path))}: well-formed")


def convert(source: Path, out: Path, target: str, distractors: str, train_frac: float | None, seed: int,
            keep_repeated: bool = False, layout: str = "", columns: str = "") -> None:
    """Write ``out``, JSON in the data format, of a file or folder of dialogs in another.

    ``target``: whose turns to keep. A source with splits keeps them, unless ``train_frac`` asks to divide its training
    and validation dialogs anew; dialogs that a later split repeats are left out of training, unless ``keep_repeated``.
    Raises `InputError` when ``source`` cannot be read or ``out`` not be written.
    """
    if out.exists() and source.exists() and out.samefile(source):
        raise InputError(f"{out}: would be written over what it is made of; give the converted file another name")
    parts = [read_any(source, layout, columns)]
    splits = {split: list(entries) for split, entries in combine_corpora(
        parts, source, target, train_frac, seed, keep_repeated).items()}
    if missing := {"train", "valid"} - splits.keys():
        raise InputError(f"{source}: has no {' or '.join(sorted(missing))} split; add it beside the others, or let "
                         "--train_frac 0.85 divide the dialogs that are there")
    for entries in splits.values():
        if distractors != "none":
            add_distractors(entries, distractors, seed)
    unfinished = out.with_name(f"{out.name}.unfinished")
    try:
        with (gzip.open if out.suffix == ".gz" else open)(unfinished, "wt", encoding="utf-8", errors="replace") as file:
            for number, (split, entries) in enumerate(splits.items()):
                file.write(f"{',' if number else '{'}\n{json.dumps(split)}: [")
                for index, entry in enumerate(tqdm(entries, desc=f"Writing {split}", unit=" entries", delay=1)):
                    file.write((",\n" if index else "\n") + json.dumps(entry, ensure_ascii=False))
                file.write("]")
            file.write("\n}\n")
        os.replace(unfinished, out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); name a place you may write to") from None
    finally:
        unfinished.unlink(missing_ok=True)


def add_distractors(entries: list[dict], method: str, seed: int) -> None:
    """Put distractors before the reply of every turn that has only its reply, in place, the hardest last."""
    numbers: dict[str, int] = {}
    turns = [turn for entry in entries for turn in entry["utterances"]]
    replies = [numbers.setdefault(turn["candidates"][-1], len(numbers)) for turn in turns]
    dialogs, texts = DialogNumbers(), list(numbers)
    of = [number for entry in entries for number in [dialogs.number(entry)] * len(entry["utterances"])]
    drawn = draw_distractors(np.array(replies), dialogs.same()[of], texts, method, seed=seed)
    for turn, wrong in zip(turns, drawn[:, ::-1].tolist(), strict=True):
        if len(turn["candidates"]) == 1:
            turn["candidates"][:0] = [texts[number] for number in wrong if number >= 0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="--convert reads plain text, an utterance per line and an empty line between dialogs, also numbered or "
        "with speakers' names; a dialog per line; JSON and JSON lines of messages (OpenAI, ShareGPT, nanochat), of "
        "prompts and replies (Alpaca), or of {\"personas\": [[…], […]], \"turns\": […]}; CSV and TSV; ParlAI's "
        f"text; Parquet; and the releases of {', '.join(RELEASES)}")
    add = parser.add_argument
    add("file", nargs="?", help="a .json or .json.gz data file to check")
    add("--convert", nargs=2, metavar=("IN", "OUT.json"), type=Path,
        help="write the dialogs of the file or folder IN in the data format, then check that")
    add_reading_flags(parser)
    add("--seed", type=whole_number, default=0, help="of what is left to chance (default: %(default)s)")
    args = parser.parse_args()
    if args.convert:
        source, out = args.convert
        convert(source, out, args.target, args.distractors, args.train_frac, args.seed, args.keep_repeated,
                args.format, args.columns)
        describe(args.convert[1])
    elif args.file:
        describe(args.file)
    else:
        print(json.dumps(EXAMPLE_ENTRY, indent=1))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command(main)
