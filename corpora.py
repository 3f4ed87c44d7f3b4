"""The data format: what an entry is, how it is read and what can be wrong with it.

A data set is one JSON object of splits, ``{"train": [entry, …], "valid": [entry, …]}``, and an entry one dialog seen
from the bot's side:

    {"personality": ["i have two dogs .", …],                 who the bot is; may be empty or missing
     "utterances": [{"history": ["hello !", …],               the dialog so far, the other person's words last
                     "candidates": ["a distractor", …, "the reply that was really given"]}, …]}

This file knows nothing about tokens, models or where the file came from.
"""

import gzip
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line that names the thing, the place and the cure."""


def command(main: Callable[[], int | None]) -> None:
    """Run a script's ``main``: an `InputError` becomes one line on standard error and exit status 2.

    Ctrl-C ends quietly with 130, a closed output pipe with 141, as the shell's own commands do.
    """
    try:
        sys.exit(main())
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains on its way out
        sys.exit(141)


@contextmanager
def open_data(path: str | Path) -> Iterator[BinaryIO]:
    """A data file for reading as bytes, unpacked if it is gzipped (told by its first bytes, not by its name).

    Raises `InputError`, also while it is read, when the file is missing, cannot be read or is cut short.
    """
    try:
        with open(path, "rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            with gzip.open(file) if gzipped else nullcontext(file) as data:
                yield data
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give a .json or .json.gz file, or its address") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{path}: the gzip data is damaged or cut short; fetch the file again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None


def parse_json(data: bytes, name: str) -> object:
    """The value that JSON text in UTF-8 spells. Raises `InputError`, which begins with ``name``, when it is none."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        cure = "it is cut short, fetch it again" if error.pos >= len(error.doc.rstrip()) else "mend the JSON there"
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{name}: not JSON at {place} ({error.msg}); {cure}") from None
    except RecursionError:
        raise InputError(f"{name}: nested too deeply for a data set; the format has six levels") from None


def read_corpus(path: str | Path) -> dict[str, list[dict]]:
    """Read and check a data file, ``.json`` or gzipped.

    Returns the splits, each a list of entries as described above, in the file's order.
    Raises `InputError` when the file is missing, cut short, not UTF-8, not JSON or not in the format.
    """
    with open_data(path) as file:
        data = file.read()
    corpus = parse_json(data, str(path))
    check_corpus(corpus, path)
    return corpus


def check_corpus(corpus: object, name: str | Path = "the data") -> None:
    """Check that ``corpus`` has the format above. Raises `InputError` naming the first place that has not."""

    def wrong(place: str, what: str, cure: str) -> InputError:
        return InputError(f"{name}: {place} {what}; {cure}")

    def check_sentences(value: object, place: str) -> None:
        if not isinstance(value, list):
            raise wrong(place, f"is {_kind(value)}, not a list", "write a list of sentences")
        for index, sentence in enumerate(value):
            if not isinstance(sentence, str):
                raise wrong(f"{place}[{index}]", f"is {_kind(sentence)}, not text", "write a sentence in quotes")

    if not isinstance(corpus, dict):
        raise wrong("the file", f"holds {_kind(corpus)}", 'write {"train": […], "valid": […]}')
    if not corpus:
        raise wrong("the file", "has no split", 'write {"train": […], "valid": […]}')
    for split, entries in corpus.items():
        if not isinstance(entries, list):
            raise wrong(split, f"is {_kind(entries)}, not a list", "write a list of entries")
        for e, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise wrong(f"{split}[{e}]", f"is {_kind(entry)}, not an entry",
                            'write {"personality": […], "utterances": […]}')
            check_sentences(entry.get("personality", []), f"{split}[{e}].personality")
            if not isinstance(entry.get("utterances"), list):
                raise wrong(f"{split}[{e}].utterances", f"is {_kind(entry.get('utterances'))}, not a list",
                            'write a list of {"history": […], "candidates": […]}')
            if not entry["utterances"]:
                raise wrong(f"{split}[{e}].utterances", "is empty", "give the dialog a turn, or leave the entry out")
            for u, turn in enumerate(entry["utterances"]):
                place = f"{split}[{e}].utterances[{u}]"
                if not isinstance(turn, dict):
                    raise wrong(place, f"is {_kind(turn)}, not a turn", 'write {"history": […], "candidates": […]}')
                for field, meaning in (("history", "the dialog so far"), ("candidates", "replies, the gold one last")):
                    check_sentences(turn.get(field), f"{place}.{field}")
                    if not turn[field]:
                        raise wrong(f"{place}.{field}", "is empty", f"list {meaning}, at least one")


def require_split(splits: Mapping[str, Sequence], split: str, name: str | Path) -> Sequence:
    """Return ``splits[split]``. Raises `InputError` when there is no such split or nothing in it."""
    if split not in splits:
        raise InputError(f"{name}: no '{split}' split, only {', '.join(map(repr, splits))}; add one beside it")
    if not len(splits[split]):
        raise InputError(f"{name}: the '{split}' split is empty; add entries to it")
    return splits[split]


def _kind(value: object) -> str:
    """A JSON value's type in words."""
    names = {type(None): "missing", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
