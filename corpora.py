"""Define the data format, read its files and check them.

A data set is one JSON object of splits, ``{"train": [entry, …], "valid": [entry, …]}``. An entry is one dialog from the
bot's side:

    {"personality": ["i have two dogs .", …],          who the bot is; may be empty or missing
     "utterances": [{"history": ["hello !", …],        the dialog so far; the last utterance is the other person's
                     "candidates": ["a distractor", …, "the gold reply"]}, …]}

This file knows nothing about tokens, models or the origin of a file.
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
# Limits that protect against hostile files. Real data is far smaller: PERSONA-CHAT's file has 209 MB, its largest entry
# 60 thousand characters, its longest sentence 120.
LARGEST_FILE = 4 << 30  # bytes, unpacked
MOST_GROWTH = 100  # unpacked size / packed size: 4 for text, 12 for dialogs with repeated histories, 1,000 for a bomb
LARGEST_ENTRY = 16 << 20  # characters
LONGEST_SENTENCE = 100_000  # characters
MOST_SPLITS = 100
LONGEST_LINE = 1 << 24  # bytes
PIECE = 4 << 20  # bytes read at once
TOO_LONG_A_NUMBER = "a number with too many digits"


# ------------------------------------------------------------------------------------------------ reading files


def read_corpus(path: str | Path) -> dict[str, list[dict]]:
    """Read and check a data file, plain or gzipped; its first bytes tell which, not its name.

    Returns the splits in the file's order, each a list of entries in the format above. Each entry is checked as soon as
    it is read, so that a wrong or hostile file does not fill the memory.
    Raises `InputError` when the file is missing, cut short, not UTF-8, not JSON, not in the format or beyond the
    limits at the top of this file.
    """
    corpus, text = {}, JsonReader(read_pieces(path), path)
    if text.next_character() != "{":
        check_splits(text.value(), path)  # raises the right error
    for split in text.members():
        if split in corpus:
            raise InputError(f"{path}: the split {split} occurs twice; keep one")
        corpus[split] = []
        check_splits(corpus, path)
        if text.next_character() != "[":
            check_splits({split: text.value()}, path)
        for number, entry in enumerate(text.elements()):
            check_entry(entry, f"{split}[{number}]", path)
            corpus[split].append(entry)
    text.end()
    check_splits(corpus, path)
    return corpus


@contextmanager
def open_data(path: str | Path, largest: int = LARGEST_FILE) -> Iterator[BinaryIO]:
    """Open a data file for reading bytes; a gzipped one, which its first bytes tell, is unpacked.

    Raises `InputError`, also during reading, when the file is missing, cannot be read, is cut short, has more than
    ``largest`` bytes or unpacks to more than `MOST_GROWTH` times its size.
    """
    try:
        with open(path, "rb") as file:
            gzipped = file.peek(2)[:2] == b"\x1f\x8b"
            yield io.BufferedReader(_BoundedReader(gzip.open(file) if gzipped else file, file, path, largest), PIECE)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name an existing one") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{path}: the gzip data is damaged or cut short; write or fetch the file again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a readable file") from None


class _BoundedReader(io.RawIOBase):
    """A reader of a file's bytes that raises `InputError` beyond the limits."""

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
            raise InputError(f"{self.path}: unpacks to more than {MOST_GROWTH} times its size, which is suspicious; "
                             "unpack it yourself if it is genuine")
        return count


def read_pieces(path: str | Path, largest: int = LARGEST_FILE) -> Iterator[str]:
    """Yield the text of a file in pieces of a few million characters.

    Raises `InputError` like `open_data`, and when the file is not UTF-8.
    """
    decoder, done = codecs.getincrementaldecoder("utf-8-sig")(), 0
    with open_data(path, largest) as file:
        while piece := file.read(PIECE):
            if text := _decoded(decoder, piece, done, path):
                yield text
            done += len(piece)
        _decoded(decoder, b"", done, path)  # refuses an incomplete character at the end


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file with their numbers, from 1; they may end in LF, CR LF or CR.

    Raises `InputError` like `open_data`, and with the number of the first line that is not UTF-8 or is too long.
    """
    with open_data(path) as file:
        number, by_cr = 0, False
        for line in iter(lambda: file.readline(LONGEST_LINE + 1), b""):
            if len(line) > LONGEST_LINE:
                raise InputError(f"{path}: line {number + 1} is longer than {LONGEST_LINE >> 20} MiB; break the line, "
                                 "or name another file")

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
    waiting = len(decoder.getstate()[0])  # bytes of a character that began in the previous piece
    try:
        return decoder.decode(piece, final=not piece)
    except UnicodeDecodeError as error:
        place = done - waiting + error.start
        raise InputError(f"{name}: not UTF-8 at byte {place}; save the file as UTF-8") from None


class JsonReader:
    """A parser that reads JSON text value by value, so that the memory need not hold all of the text.

    It stands at a position in the text; each method goes on from there. ``name`` is the file's, for messages.
    Raises `InputError` with line and column where the text is not JSON.
    """

    def __init__(self, pieces: Iterator[str], name: str | Path):
        self.pieces, self.name = pieces, name
        self.text, self.place, self.ended = "", 0, False
        self.line, self.column = 1, 1  # where the first character of `text` is in the file
        self.decoder = json.JSONDecoder()

    def only_value(self) -> Any:
        """Return the single value that makes up the whole text."""
        value = self.value()
        self.end()
        return value

    def end(self) -> None:
        """Raise `InputError` if anything but white space is left."""
        if self.next_character():
            raise self.wrong("Extra data", self.place)

    def members(self) -> Iterator[str]:
        """Yield the keys of the object at this position. The caller reads each key's value before the next key."""
        for _ in self._listed("}"):
            if self.next_character() != '"':
                raise self.wrong("Expecting property name enclosed in double quotes", self.place)
            key = self.value()
            if self.next_character() != ":":
                raise self.wrong("Expecting ':' delimiter", self.place)
            self.place += 1
            yield key

    def elements(self) -> Iterator[Any]:
        """Yield the elements of the list at this position."""
        for _ in self._listed("]"):
            yield self.value()

    def _listed(self, closing: str) -> Iterator[None]:
        """Yield at the beginning of each item of the list or object at this position, which ends with ``closing``."""
        self.place += 1
        letter = self.next_character()
        while letter != closing:
            yield
            letter = self.next_character()
            if letter == ",":
                self.place += 1
            elif letter != closing:
                raise self.wrong("Expecting ',' delimiter", self.place)
        self.place += 1

    def value(self) -> Any:
        """Return the next value."""
        self.next_character()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.place)
                if end + 2 < len(self.text) or not self._more():  # a number might continue with "e+1"
                    self.place = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.text) - 10 or error.msg.startswith("Unterminated string")
                if not cut or not self._more():
                    raise self.wrong(error.msg, error.pos) from None
            except RecursionError:
                raise InputError(f"{self.name}: nested too deeply for a data set; use at most the six levels of the "
                                 "format") from None
            except ValueError:  # Python raises it for numbers of thousands of digits
                raise self.wrong(TOO_LONG_A_NUMBER, self.place) from None
            if len(self.text) - self.place > LARGEST_ENTRY:
                raise InputError(f"{self.name}: the value at {self._where(self.place)} is longer than "
                                 f"{LARGEST_ENTRY:,} characters; split the dialog")

    def next_character(self) -> str:
        """Skip white space and return the next character, without reading past it; "" at the end of the text."""
        while True:
            self.place = SPACE.match(self.text, self.place).end()
            if self.place < len(self.text) or not self._more():
                return self.text[self.place:self.place + 1]

    def wrong(self, what: str, place: int) -> InputError:
        """Return the error to raise for text that is not JSON at ``place``, an index into `text`."""
        cut = self.ended and (not self.text[place:].strip() or what.startswith("Unterminated string"))
        cure = "the file is cut short, write or fetch it again" if cut else "correct the JSON there"
        return InputError(f"{self.name}: not JSON at {self._where(place)} ({what}); {cure}")

    def _where(self, place: int) -> str:
        lines = self.text[:place].split("\n")
        column = len(lines[-1]) + (self.column if len(lines) == 1 else 1)
        return f"line {self.line + len(lines) - 1}, column {column}"

    def _more(self) -> bool:
        """Read the next piece and drop the text before the position. Return False at the end of the file."""
        piece = next(self.pieces, "")
        self.ended = not piece
        if piece:
            taken = self.text[:self.place]
            if "\n" in taken:
                self.line, self.column = self.line + taken.count("\n"), 1
            self.column += len(taken) - taken.rfind("\n") - 1
            self.text, self.place = self.text[self.place:] + piece, 0
        return bool(piece)


# --------------------------------------------------------------------------------------------- checking the format


def check_corpus(corpus: Any, name: str | Path = "the data") -> None:
    """Raise `InputError` that names the first place where ``corpus`` is not in the format above."""
    check_splits(corpus, name)
    for split, entries in corpus.items():
        for number, entry in enumerate(entries):
            check_entry(entry, f"{split}[{number}]", name)


def check_splits(corpus: Any, name: str | Path) -> None:
    """Check the splits as `check_corpus` does, but not their entries."""
    if not isinstance(corpus, dict):
        raise _wrong(name, "the file", f"holds {_kind(corpus)}", 'write {"train": […], "valid": […]}')
    if not corpus:
        raise _wrong(name, "the file", "has no split", 'write {"train": […], "valid": […]}')
    if len(corpus) > MOST_SPLITS:
        raise _wrong(name, "the file", f"has more than {MOST_SPLITS} splits", "put the entries into fewer lists")
    for split, entries in corpus.items():
        if not split.isprintable() or not 0 < len(split) <= 100:
            raise _wrong(name, f"the split {split[:100]!r}", "has a name that is empty, longer than 100 characters or "
                         "not printable", "call it train or valid")
        if not isinstance(entries, list):
            raise _wrong(name, split, f"is {_kind(entries)}, not a list", "write a list of entries")


def check_entry(entry: object, place: str, name: str | Path = "the data") -> None:
    """Check one entry; ``place`` and ``name`` say where it is, for the message. Raises `InputError`."""
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
            raise _wrong(name, f"{place}[{index}]", f"is {_kind(sentence)}, not text", "write a string in quotes")
        if len(sentence) > LONGEST_SENTENCE:
            raise _wrong(name, f"{place}[{index}]", f"has {len(sentence):,} characters, more than {LONGEST_SENTENCE:,}",
                         "split it into sentences")


def _wrong(name: str | Path, place: str, what: str, cure: str) -> InputError:
    return InputError(f"{name}: {place} {what}; {cure}")


def require_split(splits: Mapping[str, Dialogs], split: str, name: str | Path) -> Dialogs:
    """Return ``splits[split]``. Raises `InputError` when the split is missing or empty."""
    if split not in splits:
        raise InputError(f"{name}: no '{split}' split, only {', '.join(map(repr, splits))}; add it")
    if not len(splits[split]):
        raise InputError(f"{name}: the '{split}' split is empty; add entries to it")
    return splits[split]


def _kind(value: object) -> str:
    """Describe a JSON value's type in words."""
    names = {type(None): "missing", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
