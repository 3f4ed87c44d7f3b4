"""Dialogs of elsewhere as entries of the data format: published corpora in their release layouts, people's own files.

A reader of a file yields its dialogs as `Dialog`; `entries` makes of each what a bot learns from, an entry a side. This
file knows nothing about tokens, or where a release is kept or fetched.
"""

import re
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from cli import InputError, fraction
from corpora import Json, open_data, read_corpus, read_pieces
from dialogs import (
    HISTORY,
    TARGETS,
    Dialog,
    Turn,
    check_length,
    clean,
    divided,
    entries,
    one_side,
    without_silence,
)
from distractors import HOW

__all__ = ["HISTORY", "TARGETS", "Dialog", "Turn", "divided", "entries", "one_side", "read_any"]

LONGEST_LINE = 1 << 24  # bytes


# ------------------------------------------------------------------------------------------------ readers of files


def lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """A text file's lines, numbered from 1. Raises `InputError` naming the first that is not UTF-8, or too long."""
    with open_data(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            if len(line) > LONGEST_LINE:
                raise InputError(f"{path}: line {number} is longer than {LONGEST_LINE >> 20} MiB; a dialog is shorter: "
                                 "break the line, or name another file")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: line {number} is not UTF-8 at byte {error.start}; "
                                 "save the file as UTF-8") from None


def read_parlai(path: str | Path) -> Iterator[Dialog]:
    """ParlAI's text: a line a turn, ``1 what the other says<tab>reply<tab>reward<tab>candidate|candidate``.

    Reward and candidates may be missing. Lines are numbered; a dialog begins where the number does not rise. Lines
    ``1 your persona: i have two dogs.`` are the bot's persona, its full stops set apart as in the published JSON.
    """
    turns, persona, place, last = [], [], "", 0
    for number, line in lines(path):
        if not line.strip():
            continue
        numbered = re.fullmatch(r"([0-9]{1,9}) (.*)", line)
        if not numbered:
            raise InputError(f"{path}: line {number} does not begin with its number in the dialog; write \"1 text\", "
                             "\"2 text\", … as ParlAI does")
        count, text = int(numbered[1]), numbered[2]
        if count <= last:
            yield Dialog(place, turns, {"bot": persona}, "bot")
            turns, persona = [], []
        if not last or count <= last:
            place = f"line {number}"
        last = count
        if text.startswith("your persona: "):
            persona.append(re.sub(r"(?<=[^\s.])\.$", " .", clean(text.removeprefix("your persona: "))))
        elif not text.startswith("partner's persona: "):
            turns += _parlai_turn(text)
            check_length(turns, path, place)
    if last:
        yield Dialog(place, turns, {"bot": persona}, "bot")


def _parlai_turn(text: str) -> Iterator[Turn]:
    """What a line says: the other person's words and the bot's, if it has any."""
    said, reply, _, candidates = (text.split("\t") + ["", "", ""])[:4]
    yield Turn("other", said.replace("\\n", " "))
    gold = clean(reply.split("|")[0].replace("\\n", " "))
    others = (clean(candidate) for candidate in candidates.split("|"))
    yield Turn("bot", gold, tuple(candidate for candidate in others if candidate not in ("", gold)))


def read_dailydialog(path: str | Path) -> Iterator[Dialog]:
    """DailyDialog's text: a line a dialog, ``__eou__`` after each utterance; two people take turns."""
    for number, line in lines(path):
        if not line.strip():
            continue
        if "__eou__" not in line:
            raise InputError(f"{path}: line {number} has no __eou__ after an utterance; name the release's "
                             "dialogues_….txt, not its topic, act or emotion files")
        yield Dialog(f"line {number}", [Turn(index % 2, text) for index, text in enumerate(line.split("__eou__"))])


def read_empathetic_dialogues(path: str | Path) -> Iterator[Dialog]:
    """EmpatheticDialogues' CSV: a line an utterance, lines of one ``conv_id`` a dialog.

    Fields are never quoted: commas within them are written ``_comma_``. A ninth field of candidates is not read.
    """
    header = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance"

    def rows() -> Iterator[tuple[int, list[str]]]:
        for number, line in lines(path):
            if number == 1 and not line.startswith(header):
                raise InputError(f"{path}: line 1 is not the release's header, {header},…; name its train.csv, "
                                 "valid.csv or test.csv")
            fields = line.split(",")
            if line.strip() and len(fields) not in (8, 9):
                raise InputError(f"{path}: line {number} has {len(fields)} fields, not 8; write commas within a "
                                 "field as _comma_, as the release does")
            if number > 1 and line.strip():
                yield number, fields

    for _, dialog in groupby(rows(), key=lambda row: row[1][0]):
        (number, fields), *rest = dialog
        yield Dialog(f"line {number}", [Turn(row[4], row[5]) for row in (fields, *(row for _, row in rest))])


def read_blended_skill_talk(path: str | Path) -> Iterator[Dialog]:
    """BlendedSkillTalk's JSON: ``personas`` of two people, an utterance of each to begin with, and their ``dialog``."""
    text = Json(read_pieces(path), path)
    if text.next_letter() != "[":
        raise InputError(f"{path}: is not a list of dialogs; name the release's train.json, valid.json or test.json")
    for number, dialog in enumerate(text.elements()):
        try:
            turns = [(0, dialog["free_turker_utterance"]), (1, dialog["guided_turker_utterance"]), *dialog["dialog"]]
            yield _checked(f"dialog {number}", dialog["personas"], [text for _, text in turns],
                           [speaker for speaker, _ in turns])
        except (KeyError, TypeError, ValueError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else f"is not as in the release ({error})"
            raise InputError(f"{path}: dialog {number}, counted from 0, {what}; fetch the release again") from None


def read_jsonl(path: str | Path) -> Iterator[Dialog]:
    """A dialog a line, ``{"personas": [["i …"], ["i …"]], "turns": ["hi !", …]}``.

    ``personas``, of who opens the dialog and who answers, may be missing; the two take turns, unless ``speakers``, as
    long as ``turns``, says who speaks: 0, whose is the first persona, or 1.
    """
    for number, line in lines(path):
        if not line.strip():
            continue
        dialog = Json(iter([line]), f"{path}: line {number}").only_value()
        try:
            if not isinstance(dialog, dict) or "turns" not in dialog:
                raise ValueError("no \"turns\"")
            yield _checked(f"line {number}", dialog.get("personas", []), dialog["turns"], dialog.get("speakers"))
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: line {number} is not a dialog ({error}); write "
                             '{"personas": [["i …"], ["i …"]], "turns": ["…", "…"]}') from None


def _checked(place: str, personas: object, texts: object, speakers: object) -> Dialog:
    """A dialog of JSON's lists. Raises ``ValueError`` saying what is wrong."""

    def check(value: object, name: str) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise ValueError(f"{name} is not a list of texts")
        return value

    texts = check(texts, "turns")
    if not isinstance(personas, list) or len(personas) > 2:
        raise ValueError("personas is not a list of two lists")
    if speakers is None:
        speakers = [index % 2 for index in range(len(texts))]
    if not isinstance(speakers, list) or len(speakers) != len(texts) or not all(who in (0, 1) for who in speakers):
        raise ValueError("speakers is not a list of 0 and 1, one a turn")
    known = {number: check(persona, f"personas[{number}]") for number, persona in enumerate(personas)}
    return Dialog(place, [Turn(*turn) for turn in zip(speakers, texts, strict=True)], known)


def read_plain(path: str | Path) -> Iterator[Dialog]:
    """Plain text: a line an utterance, two people in turns, an empty line between dialogs."""
    place, said = "", []
    for number, line in lines(path):
        if line.strip():
            place = place if said else f"line {number}"
            said.append(Turn(len(said) % 2, line))
            check_length(said, path, place)
        elif said:
            yield Dialog(place, said)
            said = []
    if said:
        yield Dialog(place, said)


# ------------------------------------------------------------------------------------------------ releases, any file


class Release(NamedTuple):
    """A published corpus: where it is published, and what its files are called and read by."""

    address: str
    folders: tuple[str, ...]  # names its folder goes by
    files: dict[str, str]  # split → file; "": one file of all splits, in our own format
    read: Callable[[Path], Iterator[Dialog]] | None = None


PARLAI = "http://parl.ai/downloads/"
RELEASES = {
    "dailydialog": [Release(
        "http://yanran.li/files/ijcnlp_dailydialog.zip", ("dailydialog", "ijcnlp_dailydialog"),
        {"train": "dialogues_train.txt", "valid": "dialogues_validation.txt", "test": "dialogues_test.txt"},
        read_dailydialog)],
    "empathetic_dialogues": [Release(
        "https://dl.fbaipublicfiles.com/parlai/empatheticdialogues/empatheticdialogues.tar.gz",
        ("empathetic_dialogues", "empatheticdialogues"),
        {split: f"{split}.csv" for split in ("train", "valid", "test")}, read_empathetic_dialogues)],
    "personachat": [Release(
        "https://s3.amazonaws.com/datasets.huggingface.co/personachat/personachat_self_original.json",
        ("personachat",), {"": "personachat_self_original.json"}), *(Release(
            f"{PARLAI}convai2/convai2_fix_723.tgz", ("personachat", "ConvAI2"),
            {split: f"{split}_self_original{suffix}.txt" for split in ("train", "valid")}, read_parlai)
            for suffix in ("", "_no_cands"))],
    "blended_skill_talk": [Release(
        f"{PARLAI}blended_skill_talk/blended_skill_talk.tar.gz", ("blended_skill_talk",),
        {split: f"{split}.json" for split in ("train", "valid", "test")}, read_blended_skill_talk)],
}


def find_release(name: str, folder: Path) -> tuple[Release, dict[str, Path]] | None:
    """Which layout of corpus ``name`` lies in ``folder`` or below, and its files by split; None: none does."""
    for release in RELEASES[name]:
        found = {split: next(iter(sorted(folder.rglob(file))), None) for split, file in release.files.items()}
        if any(found.values()):
            return release, {split: path for split, path in found.items() if path}
    return None


def read_release(release: Release, files: dict[str, Path]) -> dict[str, Iterable[dict]]:
    """The splits that `find_release` found, each to be read once."""
    if not release.read:
        return {split: without_silence(corpus) for split, corpus in read_corpus(files[""]).items()}
    return {split: entries(release.read(path), path) for split, path in files.items()}


def read_any(path: Path) -> dict[str | None, Iterable[dict]]:
    """The splits, each to be read once, of a file or folder in any layout that this project reads.

    A folder is a published corpus, or holds ``train`` and ``valid`` in one of the layouts of files. A file that has no
    splits comes as one, whose name is None. Raises `InputError` when it is none of these.
    """
    if path.is_dir():
        own = {file.name.split(".")[0]: file for file in sorted(path.iterdir())
               if file.name.split(".")[0] in ("train", "valid", "test")}
        for name in RELEASES:
            if found := find_release(name, path):
                return read_release(*found)
        if not own:
            raise InputError(f"{path}: holds no corpus that is known ({', '.join(RELEASES)}) nor a train and a valid "
                             "file; name the file itself")
        return {split: entries(_reader(file)(file), file) for split, file in own.items()}
    reader = _reader(path)
    return read_corpus(path) if reader is read_corpus else {None: entries(reader(path), path)}


def _reader(path: Path) -> Callable:
    """The reader of a file, told by how it begins."""
    with open_data(path) as file:
        start = file.read(1 << 16)
    first = start.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")[0]
    if start[:2] == b"PK" or start[257:262] == b"ustar":
        raise InputError(f"{path}: is an archive; unpack it and name the folder")
    if first[:1] == b"{":
        return read_jsonl if b'"turns"' in first and b'"utterances"' not in first else read_corpus
    if first[:1] == b"[":
        return read_blended_skill_talk
    if first.startswith(b"conv_id,"):
        return read_empathetic_dialogues
    if b"__eou__" in first:
        return read_dailydialog
    return read_parlai if re.match(rb"1 (your persona: |partner's persona: |.*\t)", first) else read_plain


def add_reading_flags(parser: ArgumentParser) -> None:
    """What becomes of dialogs on their way to a data set, for training, evaluation and conversion."""
    parser.add_argument("--target", default="both", choices=TARGETS,
                        help="whose turns are learnt: both people's, or only of who speaks second or first (default: "
                             "%(default)s)")
    parser.add_argument("--distractors", default="random", choices=HOW,
                        help="wrong candidates for turns that bring none: replies of other dialogs, by chance, or "
                             "those that share most with the right one (default: %(default)s)")
    parser.add_argument("--train_frac", type=fraction, metavar="F",
                        help="divide training and validation dialogs anew, that share for training (default: as "
                             "published; 0.85 of a file without splits)")
    parser.add_argument("--keep_repeated", action="store_true",
                        help="train on dialogs that validation or test repeat, too, as releases have them (default: "
                             "they are left out of training and counted)")


