"""Files of JSON lines, and pairs of replies in them: writing that survives a kill, reading that loses nothing.

What `feedback.collect` writes and all others read; knows no models and no opinions.
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
    """Add a line a record, on the disk when this returns. A half line that a kill has left is kept as a line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
                file.write(b"\n")
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name a place with room that can be "
                         "written to") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, dict | None]]:
    """Line numbers, from 1, and the objects there; None where a line is no JSON object. Empty lines are passed over."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a file of JSON lines") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: not JSON, or not UTF-8
            record = None
        yield number, record if isinstance(record, dict) else None


def report_left_out(path: Path, problems: dict[str, list[int]]) -> None:
    """A warning a kind of problem: how many lines have it, and where the first are. The file stays as it is."""
    for problem, numbers in problems.items():
        where = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
        logger.warning("%s: %s %s %s (line %s); left out, the file keeps %s", path, f"{len(numbers):,}",
                       "line" if len(numbers) == 1 else "lines", problem, where,
                       "it" if len(numbers) == 1 else "them")


# ------------------------------------------------------------------------------------------------------- pairs


def pair_name(pair: dict) -> str:
    """What a pair is called in files of answers: a hash of what people saw and of the model that said it."""
    content = [pair["model"], pair["persona"], pair["history"], [reply["text"] for reply in pair["replies"]]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def is_pair(record: dict) -> bool:
    """Whether a line of JSON has a pair's fields with their types."""

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
    """Pairs by name, in the file's order. Lines that are none, or were edited since, are named, counted, left out.

    Raises `InputError` when the file cannot be read or holds no pair.
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
    """A name for each beginning of a dialog, by its utterances, shortest first; the last one names the whole.

    A data set has a dialog once per side, and the two sides end one utterance apart. Two entries are of one dialog
    where the whole of one is a beginning of the other.
    """
    digest, names = hashlib.sha256(), []
    for text in filter(None, map(clean, said)):  # nobody's utterance, silence, opens one side of PERSONA-CHAT's
        digest.update(json.dumps(text).encode())
        names.append(digest.hexdigest()[:16])
    return names


def whole_dialog(split: Split, dialog: int) -> list[str]:
    """All utterances of a dialog of a data set: what its turns have seen, and their gold replies."""
    said: list[str] = []
    first, end = (int(np.searchsorted(split.turn_dialog, bound)) for bound in (dialog, dialog + 1))
    for turn in range(first, end):
        history = split.texts("history", turn)
        said = history if len(history) > len(said) else said + history[-1:]  # long ones lack their beginning
        said.append(split.texts("candidates", turn)[-1])
    return said


def dialog_names(pair: dict) -> list[str]:
    """`beginnings` of the dialog that a pair is from. Earlier versions noted its number only."""
    return pair.get("beginnings") or [f"{pair['data']} {pair['split']} {pair['dialog']}"]


def held_out(pairs: Iterable[dict], part: float, seed: int) -> set[str]:
    """Names of the pairs that are kept from training, a ``part`` of the dialogs; all pairs of a dialog are or none is.

    Whichever side of the dialog a pair is from: the shortest beginning that is the whole of some pair's names it.
    Of two dialogs or more, some are kept from training and some are not, unless ``part`` is 0 or 1.
    """
    dialogs = {pair["pair"]: dialog_names(pair) for pair in pairs}
    wholes = {names[-1] for names in dialogs.values()}
    name_of = {pair: next(name for name in names if name in wholes) for pair, names in dialogs.items()}
    drawn = {name: random.Random(f"{seed} {name}").random() for name in name_of.values()}
    lowest, *middle, highest = sorted(drawn.values()) if len(drawn) > 1 else (1.0, 0.0)
    line = min(max(part, math.nextafter(lowest, 1.0)), highest) if 0 < part < 1 else part
    return {pair for pair, name in name_of.items() if drawn[name] < line}


def unseen_turns(split: Split, seen: Iterable[Sequence[str]]) -> np.ndarray:
    """The turns of a split of whose dialogs, each given by its `beginnings`, none is ``seen``: (turns,) int64."""
    known, wholes = set(), set()
    for names in seen:
        known.update(names)
        wholes.add(names[-1])
    free = [not (names[-1] in known or wholes.intersection(names))
            for names in (beginnings(whole_dialog(split, dialog)) or [""] for dialog in range(len(split)))]
    return np.flatnonzero(np.array(free, bool)[split.turn_dialog])
