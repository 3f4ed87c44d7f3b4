"""Find out the layout of any file of dialogs, and convert its dialogs to entries of the data format.

The readers themselves are in releases.py (published corpora) and in texts.py, records.py and rows.py (users' files).
"""

import logging
import re
from argparse import ArgumentParser, ArgumentTypeError
from argparse import _ArgumentGroup as ArgumentGroup
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from cli import InputError, fraction
from columns import is_row, is_table, is_utterance
from corpora import check_entry, read_corpus
from dialogs import (
    TARGETS,
    Dialog,
    make_entries,
)
from distractors import METHODS
from records import SPLIT_NAMES, gather_turns, is_lines, peek, read_marked, read_records, records
from releases import (
    RELEASES,
    find_release,
    known_release,
    read_blended_skill_talk,
    read_dailydialog,
    read_empathetic_dialogues,
    read_multi_session_chat,
    read_parlai,
    read_release,
    read_synthetic_persona_chat,
    read_topical_chat,
)
from rows import read_table
from shapes import LIST_KEYS, is_entry, is_record, is_turn, lower_keys, shape_of
from texts import (
    foreign_format,
    read_delimited,
    read_labelled,
    read_numbered,
    read_parlai_fields,
    read_plain,
    read_sample,
    sample_lines,
    text_layout,
)

# How the first line of a JSON file begins.
JSON_START = re.compile(r'\{\s*($|["\'}])|\[\s*($|[{\["\]]|-?[0-9.]+\s*(,|\]\s*($|[,\]]))|true|false|null)')
MARKUP_START = re.compile(r"<(\?xml|!doctype|html|body|head|div)", re.IGNORECASE)
logger = logging.getLogger("readers")


def read_jsonl(path: str | Path) -> Iterator[Dialog]:
    """Yield the dialogs of JSON lines or of any other JSON file; the first record's shape applies to all."""
    return (dialog for _, _, dialog in read_records(path))


class Format(NamedTuple):
    """A layout of files and its reader."""

    name: str  # for messages
    read: Callable[..., Iterator[Dialog]]


FORMATS = {
    "json": Format("JSON", read_jsonl),
    "plain": Format("plain text", read_plain),
    "numbered": Format("numbered lines", read_numbered),
    "labelled": Format("lines with speakers' names", read_labelled),
    "delimited": Format("a dialog per line", read_delimited),
    "marked": Format("text with a chat template's marks", read_marked),
    "table": Format("a table", read_table),
    "parlai": Format("ParlAI's numbered text", read_parlai),
    "parlai_fields": Format("ParlAI's text with fields", read_parlai_fields),
    "dailydialog": Format("DailyDialog", read_dailydialog),
    "empathetic_dialogues": Format("EmpatheticDialogues", read_empathetic_dialogues),
    "blended_skill_talk": Format("BlendedSkillTalk", read_blended_skill_talk),
    "synthetic_persona_chat": Format("Synthetic-Persona-Chat", read_synthetic_persona_chat),
    "topical_chat": Format("Topical-Chat", read_topical_chat),
    "multi_session_chat": Format("Multi-Session Chat", read_multi_session_chat),
}
FORMAT_ALIASES = {  # other names for the layouts

    "openai": "json", "messages": "json", "sharegpt": "json", "nanochat": "json", "alpaca": "json", "jsonl": "json",
    "parquet": "json", "csv": "table", "tsv": "table", "text": "plain", "txt": "plain", "tabs": "delimited",
    "dialogpt": "delimited", "labels": "labelled", "speakers": "labelled"}


def read_any(path: Path, layout: str = "", columns: str = "") -> Mapping[Any, Iterable[dict]]:
    """Read a file or folder in any known layout; return entries by split, each to be iterated once.

    A folder is a published corpus or contains files named ``train`` and ``valid``. A file without splits gives one
    split with the name None. ``layout``: a name in `FORMATS`; "" finds it out. ``columns``: those of a table, see
    `rows.read_table`. The layout and the number of dialogs are logged at the end of each split.
    Raises `InputError` when the layout is unknown, and for errors in the file, also during iteration.
    """
    if not path.is_dir():
        return _read_file(path, layout, columns)
    if not layout and (name := known_release(path)) and (found := find_release(name, path)):
        logger.info("%s: the release of %s", path, name)
        return read_release(*found)
    own: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        named = re.match(r"([a-z]+)(?:-\d+-of-\d+)?(?:\.|$)", file.name)
        if file.is_file() and named and named[1] in SPLIT_NAMES:
            own.setdefault(SPLIT_NAMES[named[1]], []).append(file)
    if not own:
        for name in RELEASES:
            if found := find_release(name, path):
                logger.info("%s: the release of %s", path, name)
                return read_release(*found)
        raise InputError(f"{path}: contains neither a published corpus ({', '.join(RELEASES)}) nor files named train "
                         "and valid; name the file itself")
    for split, files in own.items():
        if len(files) > 1 and not all("-of-" in file.name for file in files):
            raise InputError(f"{path}: contains {files[0].name} and {files[1].name}, both for {split}; keep one")
    return {split: chain.from_iterable(chain.from_iterable(_read_file(file, layout, columns).values())
                                       for file in files) for split, files in own.items()}


def _read_file(path: Path, layout: str, columns: str) -> Mapping[Any, Iterable[dict]]:
    layout = layout or ("table" if columns else layout_of(path))
    if layout == "corpus":
        return read_corpus(path)
    if layout == "entries":
        return {None: _read_entries(path)}
    if layout == "json" and peek(path)[0]:  # the splits of one file are collected in memory
        splits: dict[str | None, list] = {}
        name = ""
        for split, shape, dialog in read_records(path):
            name = name or shape
            splits.setdefault(split, []).append(dialog)
        return {split: make_entries(_count(dialogs, f"{path}, {split}", name), path)
                for split, dialogs in splits.items()}
    if layout == "json":
        found = read_records(path)
        first = next(found, None)
        dialogs = (dialog for _, _, dialog in chain([first] if first else [], found))
        return {None: make_entries(_count(dialogs, path, first[1] if first else "JSON"), path)}
    read = FORMATS[layout].read(path, columns) if layout == "table" else FORMATS[layout].read(path)
    return {None: make_entries(_count(read, path, FORMATS[layout].name), path)}


def _count(dialogs: Iterable[Dialog], path: str | Path, name: str) -> Iterator[Dialog]:
    """Yield the dialogs; at the end, log their layout, ``name``, their number and how often each note occurred."""
    count, notes = 0, Counter()
    for dialog in dialogs:
        count += 1
        notes.update(dialog.notes)
        yield dialog
    noted = "".join(f", {number:,} {note}" for note, number in notes.items())
    logger.info("%s: %s, %s dialog%s%s", path, name, f"{count:,}", "s" * (count != 1), noted)


def _read_entries(path: Path) -> Iterator[dict]:
    """Yield entries of the data format from a list or from JSON lines."""
    for number, (_, _, entry) in enumerate(gather_turns(records(path))):
        check_entry(entry, f"entry {number}", path)
        yield entry


def layout_of(path: Path) -> str:
    """Find out the layout of a file from its beginning.

    Returns a name in `FORMATS`, "corpus" for the data format, or "entries" for a list of its entries.
    Raises `InputError` that says what the file looks like if it has no known layout.
    """
    start = read_sample(path)
    if start[:4] == b"PAR1":
        return _json_layout(path, "[")
    if start[:2] == b"PK" or start[257:262] == b"ustar":
        raise InputError(f"{path}: is an archive; unpack it and name the folder")
    for magic, what in ((b"%PDF", "a PDF"), (b"SQLite format", "a SQLite database"), (b"\x80", "a pickle"),
                        (b"ARROW1", "an Arrow file"), (b"\xd0\xcf\x11\xe0", "an Office document"),
                        (b"{\\rtf", "an RTF document"), (b"\x28\xb5\x2f\xfd", "packed with zstd"),
                        (b"BZh", "packed with bzip2"), (b"\xfd7zXZ", "packed with xz")):
        if start.startswith(magic):
            raise InputError(f"{path}: is {what}; save its dialogs as text or JSON lines")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start and b"\n" in start.replace(b"\r", b"\n"):
        raise InputError(f"{path}: is not text in UTF-8 but in another encoding, or binary; save the file as UTF-8")
    found = sample_lines(path)
    first = next((line for line in found if line.strip()), "").lstrip()
    if JSON_START.match(first):
        return _json_layout(path, first)
    if MARKUP_START.match(first):
        raise InputError(f"{path}: is XML or HTML; save its dialogs as text or JSON lines")
    if first.startswith("conv_id,utterance_idx,context,prompt"):
        return "empathetic_dialogues"
    if "user 1 personas" in first.casefold() and "best generated conversation" in first.casefold():
        return "synthetic_persona_chat"
    if is_table(found, path.name):
        return "table"
    layout = text_layout(found)
    if layout == "plain" and (what := foreign_format(found)):
        raise InputError(f"{path}: looks like {what}, not like dialogs in plain text; convert it to a layout that "
                         "python example_entry.py --help lists, or name its layout with --format")
    return layout


def convertible_layout(path: Path) -> str | None:
    """Describe the layout of a file of dialogs that is not in the data format; return None for all other files."""
    try:
        layout = layout_of(path)
        if layout == "json":
            return shape.name if (shape := shape_of(peek(path)[1])) else None
    except (InputError, ValueError):
        return None
    if layout == "plain" and path.name.removesuffix(".gz").endswith(".json"):  # it was meant to be JSON
        return None
    return FORMATS[layout].name if layout in FORMATS else None


def _json_layout(path: Path, first: str) -> str:
    """Find out the layout of a file that begins like JSON."""
    split, record = peek(path)
    if isinstance(record, dict):
        if "free_turker_utterance" in record:
            return "blended_skill_talk"
        if "previous_dialogs" in record and "dialog" in record:
            return "multi_session_chat"
        if is_entry(record):
            return "corpus" if split else "entries"
        if is_turn(record) and not split:
            return "entries"
        if not split and (is_utterance(record) or not is_record(record) and is_row(record)):
            return "table"
        named = next(iter(record.values()), None)
        if isinstance(named, dict) and isinstance(named.get("content"), list) and "config" in named:
            return "topical_chat"
        lists = all(isinstance(value, list) for value in record.values()) and not record.keys() & set(LIST_KEYS)
        if (record.keys() <= SPLIT_NAMES.keys() or lists) and not is_record(record) and not is_record(
                lower_keys(record)):
            return "corpus"
    if record is None:  # the file is damaged; the reader will say how
        return "json" if first[:1] == "[" or is_lines(path) else "corpus"
    return "corpus" if split and not is_record(record) else "json"


def add_reading_flags(parser: ArgumentParser | ArgumentGroup) -> None:
    """Add the flags that say how a file of dialogs becomes a data set, in training, evaluation and conversion."""
    parser.add_argument("--format", type=format_name, default="", metavar="NAME",
                        help=f"layout of the data file: {', '.join(FORMATS)} (default: found out from its beginning)")
    parser.add_argument("--columns", default="", metavar="NAMES",
                        help="columns of a table, by name or number: the utterances of a row, such as question,answer; "
                             "or their uses, prompt=…,reply=…,persona=…,dialog=… or text=…,speaker=…,dialog=… "
                             "(default: found by their names)")
    parser.add_argument("--target", default="both", choices=TARGETS,
                        help="speaker whose turns are learnt (default: %(default)s)")
    parser.add_argument("--distractors", default="random", choices=METHODS,
                        help="wrong candidates for turns that have none: replies of other dialogs, drawn at random, or "
                             "hard ones, which share most words with the gold reply (default: %(default)s)")
    parser.add_argument("--train_frac", type=fraction, metavar="F",
                        help="divide training and validation dialogs anew, with this share for training (default: as "
                             "published; 0.85 for a file without splits)")
    parser.add_argument("--keep_repeated", action="store_true",
                        help="also train on dialogs that validation or test repeat (default: leave them out)")


def format_name(text: str) -> str:
    """Return the name in `FORMATS` that a text stands for; a ``type`` for argparse."""
    name = text.strip().casefold().replace("-", "_")
    name = FORMAT_ALIASES.get(name, name)
    if name and name not in FORMATS:
        raise ArgumentTypeError(f"no layout is called {text[:40]!r}; the known ones are {', '.join(FORMATS)}")
    return name
