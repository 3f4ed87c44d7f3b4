"""The data format: what an entry is, how it is read and what can be wrong with it.

A data set is one JSON object of splits, ``{"train": [entry, …], "valid": [entry, …]}``, and an entry one dialog seen
from the bot's side:

    {"personality": ["i have two dogs .", …],                 who the bot is; may be empty or missing
     "utterances": [{"history": ["hello !", …],               the dialog so far, the other person's words last
                     "candidates": ["a distractor", …, "the reply that was really given"]}, …]}

This file knows nothing about tokens, models or where the file came from.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from cli import InputError

Dialogs = TypeVar("Dialogs", bound=Sequence)
SPACE = re.compile(r"[ \t\n\r]*")  # between JSON values
# What a file may make us do. Real dialogs stay far below: PERSONA-CHAT's file has 209 MB, its largest entry 60
# thousand letters, its longest sentence 120.
LARGEST_FILE = 4 << 30  # bytes, unpacked
MOST_GROWTH = 100  # unpacked over gzipped; text comes to 4, dialogs that repeat their histories to 12, a bomb to 1,000
LARGEST_ENTRY = 16 << 20  # letters of one dialog
LONGEST_SENTENCE = 100_000  # letters
MOST_SPLITS = 100
LONGEST_LINE = 1 << 24  # bytes
PIECE = 4 << 20  # bytes read at once


# ------------------------------------------------------------------------------------------------ reading files


def read_corpus(path: str | Path) -> dict[str, list[dict]]:
    """Read and check a data file, ``.json`` or gzipped (told by its first bytes, not by its name).

    Returns the splits, each a list of entries as described above, in the file's order. Entries are checked as they are
    read, so that a wrong or hostile file costs no more memory than one of them.
    Raises `InputError` when the file is missing, cut short, not UTF-8, not JSON, not in the format or beyond the
    limits at the top of this file.
    """
    corpus, text = {}, JsonReader(read_pieces(path), path)
    if text.next_letter() != "{":
        check_splits(text.value(), path)  # and is refused
    for split in text.members():
        if split in corpus:
            raise InputError(f"{path}: the split {split} stands there twice; keep one")
        corpus[split] = []
        check_splits(corpus, path)
        if text.next_letter() != "[":
            check_splits({split: text.value()}, path)
        for number, entry in enumerate(text.elements()):
            check_entry(entry, f"{split}[{number}]", path)
            corpus[split].append(entry)
    text.end()
    check_splits(corpus, path)
    return corpus


@contextmanager
def open_data(path: str | Path, largest: int = LARGEST_FILE) -> Iterator[BinaryIO]:
    """A data file for reading as bytes, unpacked if it is gzipped (told by its first bytes, not by its name).

    Raises `InputError`, also while it is read, when the file is missing, cannot be read, is cut short, has more than
    ``largest`` bytes or unpacks as no text does.
    """
    try:
        with open(path, "rb") as file:
            gzipped = file.peek(2)[:2] == b"\x1f\x8b"
            yield io.BufferedReader(_BoundedReader(gzip.open(file) if gzipped else file, file, path, largest), PIECE)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name one that is there") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{path}: the gzip data is damaged or cut short; write or fetch the file again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None


class _BoundedReader(io.RawIOBase):
    """What comes out of a file, given up when it is more than there is use for."""

    def __init__(self, unpacked: io.BufferedIOBase, file: io.BufferedIOBase, path: str | Path, largest: int):
        self.unpacked, self.file, self.path, self.largest, self.done = unpacked, file, path, largest, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.unpacked.readinto(buffer)
        self.done += count
        if self.done > self.largest:
            raise InputError(f"{self.path}: has more than {self.largest:,} bytes; split it")
        if self.unpacked is not self.file and self.done > 2 * PIECE + MOST_GROWTH * self.file.tell():
            raise InputError(f"{self.path}: unpacks to more than {MOST_GROWTH} times its size, as dialogs do not; "
                             "unpack it yourself if they do")
        return count


def read_pieces(path: str | Path, largest: int = LARGEST_FILE) -> Iterator[str]:
    """The text of a file in pieces of some million letters. Raises `InputError` as `open_data`, and if not UTF-8."""
    decoder, done = codecs.getincrementaldecoder("utf-8-sig")(), 0
    with open_data(path, largest) as file:
        while piece := file.read(PIECE):
            if text := _decoded(decoder, piece, done, path):
                yield text
            done += len(piece)
        _decoded(decoder, b"", done, path)  # refuses a letter that was not whole


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """A text file's lines, numbered from 1, whichever of LF, CR LF and CR ends them.

    Raises `InputError` naming the first that is not UTF-8, or too long.
    """
    with open_data(path) as file:
        number, by_cr = 0, False
        for line in iter(lambda: file.readline(LONGEST_LINE + 1), b""):
            if len(line) > LONGEST_LINE:
                raise InputError(f"{path}: line {number + 1} is longer than {LONGEST_LINE >> 20} MiB; a dialog is "
                                 "shorter: break the line, or name another file")
            try:
                text = line.decode("utf-8" if number else "utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: line {number + 1} is not UTF-8 at byte {error.start}; "
                                 "save the file as UTF-8") from None
            by_cr = "\r" in text if not number else by_cr
            for one in text.split("\r") if by_cr else [text]:
                number += 1
                yield number, one


def _decoded(decoder: codecs.IncrementalDecoder, piece: bytes, done: int, name: str | Path) -> str:
    waiting = len(decoder.getstate()[0])  # bytes of a letter that the last piece had cut
    try:
        return decoder.decode(piece, final=not piece)
    except UnicodeDecodeError as error:
        place = done - waiting + error.start
        raise InputError(f"{name}: not UTF-8 at byte {place}; save the file as UTF-8") from None


class JsonReader:
    """JSON text taken apart value by value, so that a file need not be in memory both as text and as values."""

    def __init__(self, pieces: Iterator[str], name: str | Path):
        self.pieces, self.name = pieces, name
        self.text, self.place, self.ended = "", 0, False
        self.line, self.column = 1, 1  # of the first letter of `text`
        self.decoder = json.JSONDecoder()

    def only_value(self) -> Any:
        """The value that all of the text is."""
        value = self.value()
        self.end()
        return value

    def end(self) -> None:
        """Refuse it if anything is left."""
        if self.next_letter():
            raise self.wrong("Extra data", self.place)

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here. The caller takes each one's value before the next key."""
        for _ in self._listed("}"):
            if self.next_letter() != '"':
                raise self.wrong("Expecting property name enclosed in double quotes", self.place)
            key = self.value()
            if self.next_letter() != ":":
                raise self.wrong("Expecting ':' delimiter", self.place)
            self.place += 1
            yield key

    def elements(self) -> Iterator[Any]:
        """The elements of the list that begins here."""
        for _ in self._listed("]"):
            yield self.value()

    def _listed(self, closing: str) -> Iterator[None]:
        """Stops at the beginning of each thing between the bracket that comes next and the ``closing`` one."""
        self.place += 1
        letter = self.next_letter()
        while letter != closing:
            yield
            letter = self.next_letter()
            if letter == ",":
                self.place += 1
            elif letter != closing:
                raise self.wrong("Expecting ',' delimiter", self.place)
        self.place += 1

    def value(self) -> Any:
        """The value that comes next, whole."""
        self.next_letter()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.place)
                if end + 2 < len(self.text) or not self._more():  # else a number might go on, by "e+1"
                    self.place = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.text) - 10 or error.msg.startswith("Unterminated string")
                if not cut or not self._more():
                    raise self.wrong(error.msg, error.pos) from None
            except RecursionError:
                raise InputError(f"{self.name}: nested too deeply for a data set; the format has six levels") from None
            except ValueError:  # what Python says to numbers of thousands of digits
                raise self.wrong("a number that long", self.place) from None
            if len(self.text) - self.place > LARGEST_ENTRY:
                raise InputError(f"{self.name}: what begins at {self._where(self.place)} is longer than "
                                 f"{LARGEST_ENTRY:,} letters; split the dialog")

    def next_letter(self) -> str:
        """The letter that comes next, after white space; empty at the end."""
        while True:
            self.place = SPACE.match(self.text, self.place).end()
            if self.place < len(self.text) or not self._more():
                return self.text[self.place:self.place + 1]

    def wrong(self, what: str, place: int) -> InputError:
        cut = self.ended and (not self.text[place:].strip() or what.startswith("Unterminated string"))
        cure = "it is cut short, write or fetch it again" if cut else "mend the JSON there"
        return InputError(f"{self.name}: not JSON at {self._where(place)} ({what}); {cure}")

    def _where(self, place: int) -> str:
        lines = self.text[:place].split("\n")
        column = len(lines[-1]) + (self.column if len(lines) == 1 else 1)
        return f"line {self.line + len(lines) - 1}, column {column}"

    def _more(self) -> bool:
        """Read on, and forget what has been taken. False when there is no more."""
        piece = next(self.pieces, "")
        self.ended = not piece
        if piece:
            taken = self.text[:self.place]
            if "\n" in taken:
                self.line, self.column = self.line + taken.count("\n"), 1
            self.column += len(taken) - taken.rfind("\n") - 1
            self.text, self.place = self.text[self.place:] + piece, 0
        return bool(piece)


# ------------------------------------------------------------------------------------------------- their checks


def check_corpus(corpus: Any, name: str | Path = "the data") -> None:
    """Check that ``corpus`` has the format above. Raises `InputError` naming the first place that has not."""
    check_splits(corpus, name)
    for split, entries in corpus.items():
        for number, entry in enumerate(entries):
            check_entry(entry, f"{split}[{number}]", name)


def check_splits(corpus: Any, name: str | Path) -> None:
    """`check_corpus` without a look into the entries."""
    if not isinstance(corpus, dict):
        raise _wrong(name, "the file", f"holds {_kind(corpus)}", 'write {"train": […], "valid": […]}')
    if not corpus:
        raise _wrong(name, "the file", "has no split", 'write {"train": […], "valid": […]}')
    if len(corpus) > MOST_SPLITS:
        raise _wrong(name, "the file", f"has more than {MOST_SPLITS} splits", "put the entries into few lists")
    for split, entries in corpus.items():
        if not split.isprintable() or not 0 < len(split) <= 100:
            raise _wrong(name, f"the split {split[:100]!r}", "has no printable, short name", "call it train or valid")
        if not isinstance(entries, list):
            raise _wrong(name, split, f"is {_kind(entries)}, not a list", "write a list of entries")


def check_entry(entry: object, place: str, name: str | Path = "the data") -> None:
    """Check one entry, which stands at ``place`` of ``name``. Raises `InputError` naming what is wrong in it."""
    if not isinstance(entry, dict):
        raise _wrong(name, place, f"is {_kind(entry)}, not an entry", 'write {"personality": […], "utterances": […]}')
    _check_sentences(entry.get("personality", []), f"{place}.personality", name)
    turns = entry.get("utterances")
    if not isinstance(turns, list):
        raise _wrong(name, f"{place}.utterances", f"is {_kind(turns)}, not a list",
                     'write a list of {"history": […], "candidates": […]}')
    if not turns:
        raise _wrong(name, f"{place}.utterances", "is empty", "give the dialog a turn, or leave the entry out")
    for number, turn in enumerate(turns):
        of_turn = f"{place}.utterances[{number}]"
        if not isinstance(turn, dict):
            raise _wrong(name, of_turn, f"is {_kind(turn)}, not a turn", 'write {"history": […], "candidates": […]}')
        for field, meaning in (("history", "the dialog so far"), ("candidates", "replies, the gold one last")):
            _check_sentences(turn.get(field), f"{of_turn}.{field}", name)
            if not turn[field]:
                raise _wrong(name, f"{of_turn}.{field}", "is empty", f"list {meaning}, at least one")


def _check_sentences(value: object, place: str, name: str | Path) -> None:
    if not isinstance(value, list):
        raise _wrong(name, place, f"is {_kind(value)}, not a list", "write a list of sentences")
    for index, sentence in enumerate(value):
        if not isinstance(sentence, str):
            raise _wrong(name, f"{place}[{index}]", f"is {_kind(sentence)}, not text", "write a sentence in quotes")
        if len(sentence) > LONGEST_SENTENCE:
            raise _wrong(name, f"{place}[{index}]", f"has {len(sentence):,} letters, more than {LONGEST_SENTENCE:,}",
                         "split it into sentences")


def _wrong(name: str | Path, place: str, what: str, cure: str) -> InputError:
    return InputError(f"{name}: {place} {what}; {cure}")


def require_split(splits: Mapping[str, Dialogs], split: str, name: str | Path) -> Dialogs:
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
