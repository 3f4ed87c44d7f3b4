"""Read users' tables, CSV or TSV, with an exchange, an utterance or a dialog per row; columns are found by name."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from cli import InputError, printable
from columns import (
    COLUMN_NAMES,
    HEADLINE,
    column_key,
    find_columns,
    find_delimiter,
    further_prompts,
    numbered_columns,
)
from corpora import JsonReader, read_lines
from dialogs import Dialog, Utterance
from records import is_json, records
from releases import read_rows, split_sentences
from shapes import FURTHER_KEYS, is_record, parse_list, read_chat, read_transcript, shape_of
from texts import answering_speaker

TableRow = tuple[str, list[str]]  # the row's place in the file, for messages, and its fields


def read_table(path: str | Path, columns: str = "") -> Iterator[Dialog]:
    """Read a table with a header: of prompts and replies, of utterances with speakers, or of whole dialogs.

    ``columns``, if not empty, names the columns by name or number (from 1), separated by commas. It either lists the
    utterances of a row in order, or gives each column a use: ``prompt=…,reply=…,persona=…,dialog=…`` or
    ``text=…,speaker=…,dialog=…``. Consecutive rows with the same ``dialog`` are one dialog. If all columns are given by
    number, the table has no header.
    Raises `InputError` when the columns are not found, or when a row has more fields than the header.
    """
    rows = _rows(path)
    _, header = next(rows, ("line 1", []))
    turns, uses = _columns(path, header, columns)
    if columns and all(one.strip().isdecimal() for one in re.sub(r"\w+=", "", columns).split(",")):
        rows = _rows(path)  # the first row is not a header
    rows = (row for row in rows if _check_row(path, *row, header))
    if turns:
        for place, row in rows:
            said = [Utterance(index % 2, _field(row, column)) for index, column in enumerate(turns)]
            yield _make_dialog(place, said, row=row, uses=uses)
    elif "whole" in uses:
        for place, row in rows:
            yield _make_dialog(place, *_whole(path, place, _field(row, uses["whole"])), row=row, uses=uses)
    else:
        for of_one in _by_dialog(path, rows, uses):
            place, first = of_one[0]
            if "speaker" in uses and "reply" not in uses:
                dialog = read_chat(place, [{"role": _field(row, uses["speaker"]).strip() or "?",
                                            "content": _field(row, uses["text"])} for _, row in of_one])
                yield _make_dialog(place, dialog.utterances, dialog.personas, row=first, uses=uses)
            else:
                said = [turn for _, row in of_one for turn in _turns(row, uses, header)]
                yield _make_dialog(place, said, row=first, uses=uses)


def _rows(path: str | Path) -> Iterator[TableRow]:
    """Yield the rows of a table, the header first; for records, the keys of the first one, then the values of each."""
    if is_json(path):
        header: list[str] = []
        for _, place, record in records(path):
            if not isinstance(record, dict):
                raise InputError(f"{path}: {place} is not an object like the first record; write objects only")
            if not header:
                header = list(record)
                yield place, header
            yield place, [_cell(record.get(name)) for name in header]
        return
    written = (line for _, line in read_lines(path) if line.strip())
    first = next(written, "")
    headline = first.startswith(HEADLINE)
    rows = read_rows(path, find_delimiter(next(written, "") if headline else first))
    for index, (number, row) in enumerate(rows):
        if index or not headline:
            yield f"line {number}", row


def _cell(value: object) -> str:
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None or value != value else str(value)  # NaN stands for an empty cell


def _by_dialog(path: str | Path, rows: Iterator[TableRow], uses: dict[str, int]) -> Iterator[list[TableRow]]:
    """Yield the rows of each dialog, which need not be adjacent. Without a column of dialogs, each row is a dialog."""
    key: Callable[[TableRow], object]
    if "dialog" in uses:
        def key(row: TableRow) -> object:
            return _field(row[1], uses["dialog"])
    else:
        def key(row: TableRow) -> object:
            return row[0] if "reply" in uses else 0  # without a column of replies, all rows are one dialog

    ended, last = set(), None
    for row in _rows(path) if "dialog" in uses else ():  # a first pass, so that few rows are kept in memory
        if key(row) != last and key(row) in ended:
            dialogs: dict[object, list[TableRow]] = {}
            for one in rows:
                dialogs.setdefault(key(one), []).append(one)
            yield from dialogs.values()
            return
        ended.add(last := key(row))
    for _, of_one in groupby(rows, key=key):
        yield list(of_one)


def _whole(path: str | Path, place: str, text: str) -> tuple[list[Utterance], Mapping]:
    """Read the turns and personas of a dialog from one field: a transcript, or a list in JSON or Python's notation."""
    value: Any = parse_list(text)
    if value is None and text.lstrip()[:1] in ("[", "{"):
        value = JsonReader(iter([text]), f"{path}: {place}").only_value()
    if value is not None and not is_record(value):
        raise InputError(f"{path}: {place} has JSON that is not a dialog; write a list of messages or of utterances")
    dialog = read_transcript("", text) if value is None else shape_of(value).read("", value)
    return dialog.utterances, dialog.personas


def _turns(row: list[str], uses: dict[str, int], header: list[str]) -> Iterator[Utterance]:
    if "reply" in uses:
        names = [column_key(name) for name in header]
        more = [_field(row, names.index(name)) for name in FURTHER_KEYS.get(names[uses["prompt"]], ()) if name in names]
        yield Utterance("prompt", " ".join([_field(row, uses["prompt"]), *more]))
        yield Utterance("reply", _field(row, uses["reply"]))
    else:
        yield Utterance(None, _field(row, uses["text"]))


def _make_dialog(place: str, turns: list[Utterance], personas: Mapping | None = None, *, row: list[str],
              uses: dict[str, int]) -> Dialog:
    """Make a dialog with the persona of the dialog's first ``row``. Without names of speakers, two alternate."""
    if turns and all(turn.speaker is None for turn in turns):
        turns = [turn._replace(speaker=index % 2) for index, turn in enumerate(turns)]
    persona = split_sentences(_field(row, uses["persona"]) if "persona" in uses else "")
    who = answering_speaker(turns)
    personas = {**(personas or {}), **({who: persona} if persona and who is not None else {})}
    return Dialog(place, turns, personas, notes=("with a persona",) if any(personas.values()) else ())


def _field(row: list[str], column: int) -> str:
    return row[column] if column < len(row) else ""


def _check_row(path: str | Path, place: str, row: list[str], header: list[str]) -> bool:
    if len(row) > len(header) and any(map(str.strip, row[len(header):])):
        raise InputError(f"{path}: {place} has {len(row)} fields, not {len(header)}; put quotation marks "
                         "around fields that contain the delimiter")
    return True


def _columns(path: str | Path, header: list[str], columns: str) -> tuple[list[int], dict[str, int]]:
    """Return the columns of a row's utterances in order, or [] and the column of each use."""
    names = [column_key(name) for name in header]

    def column(wanted: str) -> int:
        if wanted.strip().isdecimal() and 1 <= int(wanted) <= len(header):
            return int(wanted) - 1
        if column_key(wanted) in names:
            return names.index(column_key(wanted))
        raise InputError(f"{path}: has no column {wanted.strip()!r} for --columns, only {_listed(header)}; name those, "
                         "names or numbers, counted from 1")

    if columns:
        asked = [one.partition("=") for one in columns.split(",")]
        if not any(equals for _, equals, _ in asked):
            if len(asked) < 2:
                raise InputError(f"{path}: --columns {columns} names one column; name two or more, with commas between")
            return [column(name) for name, _, _ in asked], {}
        uses = {kind.strip(): column(name) for kind, _, name in asked}
        if unknown := uses.keys() - COLUMN_NAMES.keys():
            raise InputError(f"{path}: --columns {columns}: {sorted(unknown)[0]!r} is not a use of columns; the uses "
                             f"are {', '.join(COLUMN_NAMES)}")
    else:
        uses = find_columns(header)
        if turns := [] if "reply" in uses and "prompt" in uses else numbered_columns(header):
            return turns, uses
    if {"prompt", "reply"} <= uses.keys():
        if further := further_prompts(header, uses["prompt"]):
            return [*further, uses["prompt"], uses["reply"]], uses
        return [], {kind: at for kind, at in uses.items() if kind in ("prompt", "reply", "persona")
                    or kind == "dialog" and (columns or names[at].endswith(("id", "nummer")))}
    if "text" in uses and {"speaker", "dialog"} & uses.keys():
        return [], {kind: at for kind, at in uses.items() if kind in ("text", "speaker", "dialog", "persona")}
    if "whole" in uses:
        return [], {kind: at for kind, at in uses.items() if kind in ("whole", "persona")}
    raise InputError(f"{path}: its columns {_listed(header)} have no known names of prompts and replies, or of "
                     "utterances and speakers; name them, for example --columns question,answer")


def _listed(header: Iterable[str]) -> str:
    return ", ".join(repr(printable(name.strip()[:30])) for name in list(header)[:8]) or "(none)"
