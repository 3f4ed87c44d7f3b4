"""Read and write files of JSON lines and pairs of replies; a kill loses no complete line.

`feedback.collect` writes these files, and the other commands read them.
"""

import hashlib
import json
import logging
import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from cli import InputError
from dialogs import clean
from tables import Split

logger = logging.getLogger("feedback.pairs")


def append_json_lines(path: Path, records: list[dict]) -> None:
    """Append a line per record and flush it to the disk. A half line, left by a kill, becomes a line of its own."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
                file.write(b"\n")
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name a file on a disk with room where you "
                         "may write") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, dict | None]]:
    """Yield line numbers, from 1, and JSON objects; None if a line is not a JSON object. Empty lines are skipped.

    Halves of UTF-16 pairs, which JSON can spell but UTF-8 cannot, become question marks.
    """
    try:
        if path.exists() and not path.is_file():  # a device or a pipe may have no end
            raise InputError(f"{path}: is not an ordinary file; name a file of JSON lines")
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a file of JSON lines") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
            if b"\\ud" in line.lower():
                record = json.loads(json.dumps(record, ensure_ascii=False).encode(errors="replace"))
        except (ValueError, RecursionError):  # ValueError: not JSON, or not UTF-8
            record = None
        yield number, record if isinstance(record, dict) else None


def report_left_out(path: Path, problems: dict[str, list[int]]) -> None:
    """Log a warning per kind of problem: how many lines have it, and the first of these. The file is not changed."""
    for problem, numbers in problems.items():
        where = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
        logger.warning("%s: %s %s %s (line %s); left out, the file keeps %s", path, f"{len(numbers):,}",
                       "line" if len(numbers) == 1 else "lines", problem, where,
                       "it" if len(numbers) == 1 else "them")


# ------------------------------------------------------------------------------------------------------- pairs


def pair_name(pair: dict) -> str:
    """Return the name of a pair in files of answers: a hash of the model and the texts that people see."""
    content = [pair["model"], pair["persona"], pair["history"], [reply["text"] for reply in pair["replies"]]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def is_pair(record: dict) -> bool:
    """Return whether a JSON object has all fields of a pair, with the right types."""

    def sentences(value: object) -> bool:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)

    replies = record.get("replies")
    return (all(isinstance(record.get(name), str) for name in ("pair", "model", "data", "split"))
            and sentences(record.get("persona")) and sentences(record.get("history")) and bool(record["history"])
            and isinstance(record.get("turn"), int) and isinstance(record.get("dialog"), int)
            and isinstance(replies, list) and len(replies) == 2
            and all(isinstance(reply, dict) and isinstance(reply.get("text"), str)
                    and isinstance(reply.get("ended"), bool) and isinstance(reply.get("ids"), list)
                    and all(isinstance(one, int) and one >= 0 for one in reply["ids"]) for reply in replies)
            and ("beginnings" not in record or sentences(record["beginnings"]) and bool(record["beginnings"])))


def read_pairs(path: str | Path) -> dict[str, dict]:
    """Read pairs by name, in the order of the file. Edited lines and lines without a pair are skipped with a warning.

    Raises `InputError` if the file cannot be read or contains no pair.
    """
    path, pairs, problems = Path(path), {}, {}
    for number, record in read_json_lines(path):
        if record is None or not is_pair(record):
            problems.setdefault("that are no pair", []).append(number)
        elif pair_name(record) != record["pair"]:
            problems.setdefault("edited since they were collected", []).append(number)
        else:
            pairs[record["pair"]] = record
    report_left_out(path, problems)
    if not pairs:
        raise InputError(f"{path}: holds no pair of replies; write one with python -m feedback.collect")
    models = Counter(pair["model"] for pair in pairs.values())
    if len(models) > 1:
        logger.warning("%s: pairs of %s models: %s", path, len(models),
                       ", ".join(f"{count:,} of {model}" for model, count in models.most_common()))
    return pairs


# ----------------------------------------------------------------------------------------------- dialogs of pairs


def beginnings(said: Iterable[str]) -> list[str]:
    """Return a hash of each beginning of a dialog, the shortest first; the last hash names the whole dialog.

    A data set contains each dialog once per side, and the two sides differ in length by one utterance. Two entries are
    from the same dialog if the whole of one is a beginning of the other.
    """
    digest, names = hashlib.sha256(), []
    for text in filter(None, map(clean, said)):  # PERSONA-CHAT marks silence at the beginning of one side
        digest.update(json.dumps(text).encode())
        names.append(digest.hexdigest()[:16])
    return names


def whole_dialog(split: Split, dialog: int) -> list[str]:
    """Return all utterances of a dialog of a data set, from its histories and gold replies."""
    said: list[str] = []
    first, end = (int(np.searchsorted(split.turn_dialog, bound)) for bound in (dialog, dialog + 1))
    for turn in range(first, end):
        history = split.texts("history", turn)
        said = history if len(history) > len(said) else said + history[-1:]  # long histories lack their beginning
        said.append(split.texts("candidates", turn)[-1])
    return said


def dialog_names(pair: dict) -> list[str]:
    """Return the `beginnings` of a pair's dialog; earlier versions stored only the number of the dialog."""
    return pair.get("beginnings") or [f"{pair['data']} {pair['split']} {pair['dialog']}"]


def held_out(pairs: Iterable[dict], part: float, seed: int) -> set[str]:
    """Return the names of the pairs to hold out from training: all pairs of a share ``part`` of the dialogs.

    The two sides of a dialog count as one dialog, which is identified by its shortest whole side. With two dialogs or
    more, at least one is held out and at least one is not, unless ``part`` is 0 or 1.
    """
    dialogs = {pair["pair"]: dialog_names(pair) for pair in pairs}
    wholes = {names[-1] for names in dialogs.values()}
    name_of = {pair: next(name for name in names if name in wholes) for pair, names in dialogs.items()}
    drawn = {name: random.Random(f"{seed} {name}").random() for name in name_of.values()}
    lowest, *middle, highest = sorted(drawn.values()) if len(drawn) > 1 else (1.0, 0.0)
    line = min(max(part, math.nextafter(lowest, 1.0)), highest) if 0 < part < 1 else part
    return {pair for pair, name in name_of.items() if drawn[name] < line}


def unseen_turns(split: Split, seen: Iterable[Sequence[str]]) -> np.ndarray:
    """Return the turns of a split, (turns,) int64, from dialogs that are not ``seen``, a list of `beginnings`."""
    known, wholes = set(), set()
    for names in seen:
        known.update(names)
        wholes.add(names[-1])
    free = [not (names[-1] in known or wholes.intersection(names))
            for names in (beginnings(whole_dialog(split, dialog)) or [""] for dialog in range(len(split)))]
    return np.flatnonzero(np.array(free, bool)[split.turn_dialog])
