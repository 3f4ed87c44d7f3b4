"""Show one annotated entry of the data format, check a data file, or convert dialogs to the format.

    python example_entry.py                          print the entry below as JSON
    python example_entry.py MY_DATA.json             check a file: print its contents, or the first error and its place
    python example_entry.py --convert IN OUT.json    convert the dialogs of IN to the data format
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

# A dialog between a person, A, and the bot, from the bot's side. Each of the bot's turns is one element of
# "utterances": the dialog up to that turn, and candidates for the reply.
EXAMPLE_ENTRY = {
    # Who the bot is: short sentences in the first person. Replies should agree with them.
    "personality": [
        "i keep bees on the roof of my house .",
        "i teach chemistry at a night school .",
        "my brother is a sailor .",
        "i never drink coffee after lunch .",
    ],
    "utterances": [
        {
            # The dialog so far, the oldest utterance first. A began and spoke last, so the number is odd.
            "history": ["hello there ! how was your day ?"],
            # Candidates for the reply: distractors from other dialogs and, LAST, the reply that was really given.
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
            # The number of candidates may differ between turns; the gold reply alone is enough for training.
            "candidates": [
                "no , i do not have any pets .",
                "thanks , but coffee this late would keep me up all night .",
            ],
        },
    ],
}


def describe(path: str) -> None:
    """Check the data file at ``path`` and print a line of figures per split. Raises `InputError` for an error in it."""
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
              f"{span} candidates per turn")
        if alone := sum(len(turn["candidates"]) == 1 for turn in turns):
            print(f"  note: {alone:,} turns have the gold reply as their only candidate, so hits@1 says nothing there")
        if even:
            print(f"  note: {even:,} turns have a history of even length, which the bot opened")
    print(f"{printable(str(path))}: well-formed")


def convert(source: Path, out: Path, target: str, distractors: str, train_frac: float | None, seed: int,
            keep_repeated: bool = False, layout: str = "", columns: str = "") -> None:
    """Convert ``source``, a file or folder of dialogs in any known layout, to the data format and write it to ``out``.

    The parameters are those of `readers.read_any` (``layout``, ``columns``) and `dialogs.combine_corpora`;
    ``distractors`` is one of `distractors.METHODS`. Raises `InputError` when ``source`` cannot be read, lacks a split,
    or ``out`` cannot be written.
    """
    if out.exists() and source.exists() and out.samefile(source):
        raise InputError(f"{out}: would overwrite the file to convert; give the converted file another name")
    parts = [read_any(source, layout, columns)]
    splits = {split: list(entries) for split, entries in combine_corpora(
        parts, source, target, train_frac, seed, keep_repeated).items()}
    if missing := {"train", "valid"} - splits.keys():
        raise InputError(f"{source}: has no {' or '.join(sorted(missing))} split; add it beside the others, or divide "
                         "the existing dialogs with --train_frac 0.85")
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
        raise InputError(f"{out}: cannot be written ({error.strerror}); name a file that you may write") from None
    finally:
        unfinished.unlink(missing_ok=True)


def add_distractors(entries: list[dict], method: str, seed: int) -> None:
    """Insert distractors, the hardest last, before the gold reply of every turn that has no other candidate, in place.

    ``method``: one of `distractors.METHODS` but "none".
    """
    numbers: dict[str, int] = {}
    turns = [turn for entry in entries for turn in entry["utterances"]]
    replies = [numbers.setdefault(turn["candidates"][-1], len(numbers)) for turn in turns]
    dialogs, texts = DialogNumbers(), list(numbers)
    dialog_of_turn = [number for entry in entries for number in [dialogs.number(entry)] * len(entry["utterances"])]
    drawn = draw_distractors(np.array(replies), dialogs.representatives()[dialog_of_turn], texts, method, seed=seed)
    for turn, wrong in zip(turns, drawn[:, ::-1].tolist(), strict=True):
        if len(turn["candidates"]) == 1:
            turn["candidates"][:0] = [texts[number] for number in wrong if number >= 0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="--convert reads plain text (an utterance per line, an empty line between dialogs; lines may have "
        "numbers or speakers' names); a dialog per line; JSON and JSON lines of messages (OpenAI, ShareGPT, nanochat), "
        "of prompts and replies (Alpaca), or of {\"personas\": [[…], […]], \"turns\": […]}; CSV and TSV; ParlAI's "
        f"text; Parquet; and the releases of {', '.join(RELEASES)}. Example: python example_entry.py --convert "
        "chats.jsonl data.json")
    add = parser.add_argument
    add("file", nargs="?", help="a .json or .json.gz data file to check")
    add("--convert", nargs=2, metavar=("IN", "OUT.json"), type=Path,
        help="convert the dialogs of the file or folder IN to the data format, then check the result")
    add_reading_flags(parser)
    add("--seed", type=whole_number, default=0, help="seed of the splits and distractors (default: %(default)s)")
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
