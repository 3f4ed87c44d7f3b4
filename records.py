"""Read files of users' records: JSON lines, lists, objects that wrap them, and Parquet.

`read_records` yields a file's dialogs as `Dialog`; which shapes a record may have is known in shapes.py.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from cli import InputError, short
from columns import is_utterance
from corpora import LONGEST_LINE, TOO_LONG_A_NUMBER, JsonReader, open_data, read_lines, read_pieces
from dialogs import Dialog
from shapes import (
    LIST_KEYS,
    PERSONA_KEYS,
    ROLE_KEYS,
    Shape,
    describe_record,
    is_message,
    is_record,
    is_turn,
    lower_keys,
    parse_list,
    read_transcript,
    shape_of,
)
from texts import MAJORITY, MARKED, blocks, read_sample, sample_lines, share_of

WRAPPER_KEYS = ("data", "dialogs", "dialogues", "conversations", "items", "rows", "examples", "records", "chats")
SPLIT_NAMES = {"train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid",
               "dev": "valid", "test": "test", "testing": "test"}


def records(path: str | Path) -> Iterator[tuple[str | None, str, Any]]:
    """Yield the split, the place and the value of each record of a JSON or Parquet file.

    Records are JSON lines, the elements of a list, objects one after the other, or the elements of lists in an object,
    ``{"data": […]}`` or ``{"train": […], "valid": […]}``. The split is None if the file names none.
    Raises `InputError` like `corpora.JsonReader`.
    """
    if read_sample(path)[:4] == b"PAR1":
        for number, record in enumerate(parquet_rows(path)):
            yield None, f"dialog {number}", _row(record)
        return
    if is_lines(path):
        for number, line in read_lines(path):
            if line.strip():
                yield None, f"line {number}", _row(JsonReader(iter([line]), f"{path}: line {number}").only_value())
        return
    text = JsonReader(read_pieces(path), path)
    number = 0
    while letter := text.next_character():
        if letter == "[":
            elements = text.elements()
            first = next(elements, None)
            if _is_one_of_a_dialog(first) and any(key in first for key in ROLE_KEYS[:-1]) or isinstance(first, str):
                yield None, f"dialog {number}", [first, *elements]
                number += 1
                continue
            for value in chain([first] if first is not None else [], elements):
                yield None, f"dialog {number}", _row(value)
                number += 1
        else:
            value = text.value()
            for split, inner in _unwrapped(value):
                yield split, f"dialog {number}", inner
                number += 1


def read_marked(path: str | Path) -> Iterator[Dialog]:
    """Read text between marks of chat templates, ``<|im_start|>user``, ``[INST]``, ``<user>``.

    If most lines have several marks, each line is a dialog; otherwise an empty line ends a dialog.
    """
    several = share_of(sample_lines(path), lambda line: len(MARKED.findall(line)) > 1) >= MAJORITY
    by_line = ([line] for line in read_lines(path) if line[1].strip())
    for block in by_line if several else blocks(path):
        yield read_transcript(f"line {block[0][0]}", "\n".join(line for _, line in block))


def parquet_rows(path: str | Path) -> Iterator[dict]:
    """Yield the rows of a Parquet file as objects. Raises `InputError` without pyarrow and for damaged files."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path}: is a Parquet file, which pyarrow reads; pip install pyarrow, or save the data as "
                         "JSON lines") from None
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=1000):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as a Parquet file ({short(str(error))}); write or "
                         "fetch it again") from None


def _row(value: object) -> Any:
    """Unwrap a record of the hub's viewer, and parse lists that are stored as text, as tables store them."""
    value = value["row"] if isinstance(value, dict) and isinstance(value.get("row"), dict) else value
    if isinstance(value, dict):
        for key in LIST_KEYS:
            if isinstance(value.get(key), str) and (found := parse_list(value[key])) is not None:
                value = {**value, key: found}
    return value


def _unwrapped(value: object) -> Iterator[tuple[str | None, object]]:
    """Yield the records in an object with their splits: the object itself, the elements of its lists, or its values."""
    if not isinstance(value, dict) or is_record(value) and not any(
            isinstance(value.get(key), list) and value[key] and is_record(value[key][0])
            and not is_message(value[key][0]) for key in WRAPPER_KEYS):
        yield None, _row(value)
        return
    found = False
    for key, inner in value.items():
        split = SPLIT_NAMES.get(key)
        if isinstance(inner, list) and (split or key in WRAPPER_KEYS):
            yield from ((split, _row(one)) for one in inner)
        elif key in WRAPPER_KEYS and isinstance(inner, dict) and not is_record(inner):
            yield from ((None, one) for one in inner.values() if is_record(one))
        elif is_record(inner):
            yield None, inner
        else:
            continue
        found = True
    if not found:
        yield None, value


def _is_one_of_a_dialog(first: object) -> bool:
    """Return whether a list with this first element is one dialog, and not a list of dialogs or of rows."""
    return is_message(first) and not is_record(first) and not is_utterance(first)


def is_json(path: str | Path) -> bool:
    """Return whether a file begins like JSON or Parquet."""
    start = read_sample(path)
    return start[:4] == b"PAR1" or start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")


def is_lines(path: str | Path) -> bool:
    """Return whether each line of the file is a JSON value."""
    with open_data(path) as file:
        first = b"\n"
        while first and not first.strip():
            first = file.readline(LONGEST_LINE)
    try:
        value = JsonReader(iter([first.decode("utf-8-sig", "replace")]), path).only_value()
    except InputError as error:
        return any(what in str(error) for what in ("Extra data", TOO_LONG_A_NUMBER)) or (
            "nested too deeply" in str(error) and first[:1] == b"{")
    if isinstance(value, list):  # it is one dialog, or the list of all dialogs
        first = next(iter(value), None)
        return is_record(value) and (isinstance(first, str) or _is_one_of_a_dialog(first))
    return isinstance(value, dict) and next(_unwrapped(value), (None, None))[1] is value


def peek(path: str | Path) -> tuple[str | None, object]:
    """Return the split and the value of a JSON file's first record without reading the rest; (None, None) on errors."""
    try:
        if read_sample(path)[:4] != b"PAR1" and not is_lines(path):
            text = JsonReader(read_pieces(path), path)
            if text.next_character() == "{":
                for key in text.members():
                    if text.next_character() == "[":
                        first = next(text.elements(), None)
                        if key in SPLIT_NAMES:
                            return SPLIT_NAMES[key], _row(first)
                    break
        split, _, record = next(records(path), (None, None, None))
        return split, record
    except InputError:
        return None, None


def read_records(path: str | Path) -> Iterator[tuple[str | None, str, Dialog]]:
    """Yield the split, the name of the shape and the dialog of each record; the first record's shape applies to all.

    Raises `InputError` that names the first record of another shape.
    """
    shape = None
    for split, place, record in records(path):
        counted = f"{place}, counted from 0," if place.startswith("dialog") else place
        try:
            if not shape and not (shape := shape_of(record)) and (shape := shape_of(lower_keys(record))):
                shape = Shape(shape.name, _of_lower_keys(shape.read))
            if not shape and isinstance(record, dict) and any(record.get(key) == [] for key in LIST_KEYS):
                yield split, "empty lists", Dialog(place, [])
                continue
            if not shape:
                raise InputError(
                    f"{path}: {counted} has no layout that can be read ({describe_record(record)}); "
                    'write {"personas": [["i …"], ["i …"]], "turns": ["…", "…"]}, or name the layout with --format')
            yield split, shape.name, shape.read(place, record)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else f"is not a dialog ({error})"
            cure = f"write it like the first record, which has the layout {shape.name}" if shape else \
                'write {"personas": [["i …"], ["i …"]], "turns": ["…", "…"]}'
            raise InputError(f"{path}: {counted} {what}; {cure}") from None


def _of_lower_keys(read: Callable[[str, Any], Dialog]) -> Callable[[str, Any], Dialog]:
    return lambda place, record: read(place, lower_keys(record))


def gather_turns(found: Iterable[tuple[str | None, str, Any]]) -> Iterator[tuple[str | None, str, Any]]:
    """Yield records, with consecutive turns of one dialog joined to one entry.

    ``found``: split, place and value of each record, as `records` yields them. A turn belongs to the dialog of the turn
    before it if its history begins with that turn's history and gold reply.
    """
    held: tuple | None = None
    said: list[str] = []
    for split, place, record in found:
        if is_turn(record):
            turn = {key: record[key] for key in ("history", "candidates")}
            entry = {"personality": next((record[key] for key in PERSONA_KEYS[::-1] if record.get(key)), []),
                     "utterances": [turn]}
            goes_on = held and held[0] == split and held[2]["personality"] == entry["personality"] and (
                turn["history"][:len(said)] == said)
            said = [*turn["history"], turn["candidates"][-1]]
            if goes_on:
                held[2]["utterances"].append(turn)
                continue
            record = entry
            held, ready = (split, place, record), held
        else:
            ready, held = held, None
        if ready:
            yield ready
        if not held:
            yield split, place, record
    if held:
        yield held
