"""Describe published corpora (files, addresses, licences) and read them.

A reader takes the path of a file and yields its dialogs. Downloading and finding a release is the task of downloads.py.
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

from cli import InputError
from corpora import LONGEST_SENTENCE, JsonReader, read_corpus, read_lines, read_pieces
from dialogs import Dialog, Utterance, check_length, clean, drop_silence, make_entries

# ------------------------------------------------------------------------------------------------ readers of files


def read_parlai(path: str | Path) -> Iterator[Dialog]:
    """Read ParlAI's text, a line per turn: ``1 the other's utterance<tab>reply<tab>reward<tab>candidate|candidate``.

    Reward and candidates may be missing. Lines are numbered within a dialog; a new dialog begins where the number does
    not increase. Lines such as ``1 your persona: i have two dogs.`` give the bot's persona; a space is put before the
    final full stop, as in the published JSON.
    """
    turns, persona, place, last = [], [], "", 0
    for number, line in read_lines(path):
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


def _parlai_turn(text: str) -> Iterator[Utterance]:
    """Yield the other person's utterance and the bot's reply; either may be empty."""
    said, reply, _, candidates = (text.split("\t") + ["", "", ""])[:4]
    yield Utterance("other", said.replace("\\n", " "))
    gold = clean(reply.split("|")[0].replace("\\n", " "))
    others = (clean(candidate) for candidate in candidates.split("|"))
    yield Utterance("bot", gold, tuple(candidate for candidate in others if candidate not in ("", gold)))


def read_dailydialog(path: str | Path) -> Iterator[Dialog]:
    """Read DailyDialog's text: a line per dialog, with ``__eou__`` after each utterance; two speakers alternate."""
    for number, line in read_lines(path):
        if not line.strip():
            continue
        if "__eou__" not in line:
            raise InputError(f"{path}: line {number} has no __eou__ after an utterance; name the release's "
                             "dialogues_….txt, not its topic, act or emotion files")
        yield Dialog(f"line {number}", [Utterance(index % 2, text) for index, text in enumerate(line.split("__eou__"))])


def read_empathetic_dialogues(path: str | Path) -> Iterator[Dialog]:
    """Read EmpatheticDialogues' CSV: a line per utterance; consecutive lines with one ``conv_id`` are a dialog.

    Fields are never quoted: a comma within a field is written ``_comma_``. A ninth field, candidates, is ignored.
    """
    header = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance"

    def rows() -> Iterator[tuple[int, list[str]]]:
        for number, line in read_lines(path):
            if number == 1 and not line.startswith(header):
                raise InputError(f"{path}: line 1 is not the header of the release, {header},…; name its train.csv, "
                                 "valid.csv or test.csv")
            fields = line.split(",")
            if line.strip() and len(fields) not in (8, 9):
                raise InputError(f"{path}: line {number} has {len(fields)} fields, not 8; write a comma within a "
                                 "field as _comma_, as the release does")
            if number > 1 and line.strip():
                yield number, fields

    for _, dialog in groupby(rows(), key=lambda row: row[1][0]):
        (number, fields), *rest = dialog
        yield Dialog(f"line {number}", [Utterance(row[4], row[5]) for row in (fields, *(row for _, row in rest))])


def read_blended_skill_talk(path: str | Path) -> Iterator[Dialog]:
    """Read BlendedSkillTalk's JSON: per dialog two ``personas``, an opening utterance of each, and the ``dialog``."""
    text = JsonReader(read_pieces(path), path)
    if text.next_character() != "[":
        raise InputError(f"{path}: is not a list of dialogs; name the release's train.json, valid.json or test.json")
    for number, dialog in enumerate(text.elements()):
        try:
            turns = [(0, dialog["free_turker_utterance"]), (1, dialog["guided_turker_utterance"]), *dialog["dialog"]]
            yield checked_dialog(f"dialog {number}", dialog["personas"], [text for _, text in turns],
                                 [speaker for speaker, _ in turns])
        except (KeyError, TypeError, ValueError) as error:
            raise _wrong_release(path, f"dialog {number}, counted from 0,", error) from None


def _wrong_release(path: str | Path, place: str, error: Exception) -> InputError:
    """Return the error to raise where a dialog of a release is not as it was published."""
    what = f"has no {error}" if isinstance(error, KeyError) else f"is not as in the release ({error})"
    return InputError(f"{path}: {place} {what}; fetch the release again")


def checked_dialog(place: str, personas: object, texts: object, speakers: object) -> Dialog:
    """Make a dialog from lists of a JSON file: two personas, the texts, and their speakers as 0 and 1.

    Without ``speakers`` the two alternate. Raises ``ValueError`` that says what is wrong with the lists.
    """

    def check(value: object, name: str) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise ValueError(f"{name} is not a list of strings")
        return value

    texts = check(texts, "turns")
    if not isinstance(personas, list) or len(personas) > 2:
        raise ValueError("personas is not a list of two lists")
    if speakers is None:
        speakers = [index % 2 for index in range(len(texts))]
    if not isinstance(speakers, list) or len(speakers) != len(texts) or not all(who in (0, 1) for who in speakers):
        raise ValueError("speakers is not a list of 0 and 1, one per utterance")
    known = {number: check(persona, f"personas[{number}]") for number, persona in enumerate(personas)}
    return Dialog(place, [Utterance(*turn) for turn in zip(speakers, texts, strict=True)], known)


def read_synthetic_persona_chat(path: str | Path) -> Iterator[Dialog]:
    """Read Synthetic-Persona-Chat's CSV: two personas, a sentence per line, and a conversation, ``User 1: …``."""
    rows = read_rows(path)
    _, header = next(rows, (1, []))
    names = [name.strip().casefold() for name in header]
    wanted = ["user 1 personas", "user 2 personas", "best generated conversation"]
    if not set(wanted) <= set(names):
        raise InputError(f"{path}: line 1 lacks the columns of the release, {', '.join(wanted)}; name its "
                         "Synthetic-Persona-Chat_train.csv, _valid.csv or _test.csv")
    columns = [names.index(name) for name in wanted]
    for number, row in rows:
        first, second, talk = (row[column] if column < len(row) else "" for column in columns)
        turns: list[Utterance] = []
        for line in talk.splitlines():
            if spoken := re.fullmatch(r"\s*User (1|2)\s*:(.*)", line, re.IGNORECASE):
                turns.append(Utterance(int(spoken[1]), spoken[2]))
            elif turns:  # the utterance has several lines
                turns[-1] = turns[-1]._replace(text=f"{turns[-1].text} {line}")
        yield Dialog(f"line {number}", turns, {1: split_sentences(first), 2: split_sentences(second)})


def read_rows(path: str | Path, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Yield the non-empty rows of a CSV file, each with the number of its first line; fields may have line breaks.

    Raises `InputError` where a quotation mark is not closed or a field is too long.
    """
    begun = 1
    text = csv.reader((f"{line}\n" for _, line in read_lines(path)), delimiter=delimiter, strict=True)
    csv.field_size_limit(4 * LONGEST_SENTENCE)
    try:
        for row in text:
            if any(map(str.strip, row)):
                yield begun, row
            begun = text.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}: line {begun} is not a row of a table ({error}); close its quotation marks") from None


def split_sentences(text: str) -> list[str]:
    """Split a persona that has one sentence per line."""
    return [line for line in map(clean, text.splitlines()) if line]


def read_topical_chat(path: str | Path) -> Iterator[Dialog]:
    """Read Topical-Chat's JSON: an object of dialogs; ``content`` lists the utterances, ``message`` and ``agent``."""
    text = JsonReader(read_pieces(path), path)
    if text.next_character() != "{":
        raise InputError(f"{path}: is not an object of conversations; name the release's train.json, valid_freq.json "
                         "and so on")
    for name in text.members():
        dialog = text.value()
        try:
            yield Dialog(f"conversation {name}", [Utterance(str(turn["agent"]), _text(turn["message"]))
                                                  for turn in dialog["content"]])
        except (KeyError, TypeError, ValueError) as error:
            raise _wrong_release(path, f"conversation {name[:100]}", error) from None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a message is not a string")
    return value


def read_multi_session_chat(path: str | Path) -> Iterator[Dialog]:
    """Read Multi-Session Chat's JSON lines, a session per line.

    ``personas`` say what the two people are known for from earlier sessions, the opening speaker's first; the two
    alternate in ``dialog``. The earlier sessions, which a line repeats, are ignored: they are lines of other files, or
    dialogs of PERSONA-CHAT.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        session = JsonReader(iter([line]), f"{path}: line {number}").only_value()
        try:
            said = [turn["text"] for turn in session["dialog"]]
            yield checked_dialog(f"line {number}", session["personas"], said, None)
        except (KeyError, TypeError, ValueError) as error:
            raise _wrong_release(path, f"line {number}", error) from None


# ------------------------------------------------------------------------------------------------------- releases


class Release(NamedTuple):
    """A layout in which a corpus is published: its address, its files and their reader."""

    address: str  # address of an archive, or of each file, with {} for the file's name
    folders: tuple[str, ...]  # usual names of its folder
    files: dict[str, str]  # split → file names or patterns; "": one file of all splits in the data format
    read: Callable[[Path], Iterator[Dialog]] | None = None  # None: the data format
    known_by: str = ""  # the pattern of a file that no other corpus has


class About(NamedTuple):
    """Facts that help to choose a corpus."""

    size: str
    licence: str


PARLAI = "http://parl.ai/downloads/"
SPLITS = ("train", "valid", "test")
RELEASES = {
    "dailydialog": [Release(
        "http://yanran.li/files/ijcnlp_dailydialog.zip", ("dailydialog", "ijcnlp_dailydialog"),
        {"train": "dialogues_train.txt", "valid": "dialogues_validation.txt", "test": "dialogues_test.txt"},
        read_dailydialog, "dialogues_*.txt")],
    "empathetic_dialogues": [Release(
        "https://dl.fbaipublicfiles.com/parlai/empatheticdialogues/empatheticdialogues.tar.gz",
        ("empathetic_dialogues", "empatheticdialogues"),
        {split: f"{split}.csv" for split in SPLITS}, read_empathetic_dialogues)],
    "personachat": [Release(
        "https://s3.amazonaws.com/datasets.huggingface.co/personachat/personachat_self_original.json",
        ("personachat",), {"": "personachat_self_original.json"}, known_by="personachat_self_original.json"), *(Release(
            f"{PARLAI}convai2/convai2_fix_723.tgz", ("personachat", "ConvAI2"),
            {split: f"{split}_self_original{suffix}.txt" for split in ("train", "valid")}, read_parlai,
            f"*_self_original{suffix}.txt") for suffix in ("", "_no_cands"))],
    "blended_skill_talk": [Release(
        f"{PARLAI}blended_skill_talk/blended_skill_talk.tar.gz", ("blended_skill_talk",),
        {split: f"{split}.json" for split in SPLITS}, read_blended_skill_talk)],
    "synthetic_persona_chat": [Release(
        "https://huggingface.co/datasets/google/Synthetic-Persona-Chat/resolve/main/data/{}",
        ("synthetic_persona_chat", "Synthetic-Persona-Chat"),
        {split: f"Synthetic-Persona-Chat_{split}.csv" for split in SPLITS}, read_synthetic_persona_chat,
        "Synthetic-Persona-Chat_*.csv")],
    "topical_chat": [Release(
        "https://raw.githubusercontent.com/alexa/Topical-Chat/master/conversations/{}",
        ("topical_chat", "Topical-Chat"),
        {"train": "train.json", "valid": "valid_freq.json valid_rare.json", "test": "test_freq.json test_rare.json"},
        read_topical_chat, "valid_freq.json")],
    "multi_session_chat": [Release(
        f"{PARLAI}msc/msc_v0.1.tar.gz", ("multi_session_chat", "msc"),
        {split: f"msc_dialogue/session_*/{split}.txt" for split in SPLITS}, read_multi_session_chat,
        "msc_dialogue/session_*/*.txt"), Release(
        f"{PARLAI}msc/msc_v0.1.tar.gz", ("multi_session_chat", "msc", "msc_dialogue"),
        {split: f"session_*/{split}.txt" for split in SPLITS}, read_multi_session_chat, "session_*/*.txt")],
}
ABOUT = {
    "dailydialog": About("13,118 dialogs of daily life", "CC BY-NC-SA 4.0"),
    "empathetic_dialogues": About("24,850 dialogs about a feeling", "CC BY-NC 4.0"),
    "personachat": About("18,878 dialogs with personas", "CC BY 4.0"),
    "blended_skill_talk": About("6,808 dialogs with personas", "none stated in the release"),
    "synthetic_persona_chat": About("10,906 dialogs with personas, by a language model", "CC BY 4.0"),
    "topical_chat": About("10,784 dialogs about topics", "CDLA-Sharing-1.0"),
    "multi_session_chat": About("13,005 further sessions of the same people, with personas",
                                "none stated in the release"),
}


def corpus_name(text: str) -> str | None:
    """Return the name in `RELEASES` of the corpus that ``text`` names or whose folder it names, or None."""
    wanted = text.strip().casefold().replace("-", "_")
    for name, releases in RELEASES.items():
        if wanted in {name, *(folder.casefold().replace("-", "_") for one in releases for folder in one.folders)}:
            return name
    return None


def describe_corpora() -> str:
    """List the published corpora with size and licence, one per line."""
    width = max(map(len, ABOUT))
    return "\n".join(f"{name:{width}}  {about.size}; licence: {about.licence}" for name, about in ABOUT.items())


def find_release(name: str, folder: Path) -> tuple[Release, dict[str, list[Path]]] | None:
    """Find a layout of corpus ``name`` in ``folder`` or below; return it with its files by split, or None."""
    for release in RELEASES[name]:
        found = {split: [path for file in files.split()
                         for path in sorted(folder.rglob(file))[:None if "*" in file else 1]]
                 for split, files in release.files.items()}
        if any(found.values()):
            return release, {split: paths for split, paths in found.items() if paths}
    return None


def known_release(folder: Path) -> str | None:
    """Return the corpus that ``folder`` certainly holds, because it has a file that no other corpus has, or None."""
    return next((name for name, releases in RELEASES.items()
                 if any(one.known_by and next(folder.rglob(one.known_by), None) for one in releases)), None)


def read_release(release: Release, files: dict[str, list[Path]]) -> dict[str, Iterable[dict]]:
    """Return the entries of what `find_release` found, by split, each to be iterated once."""
    if not release.read:
        return {split: drop_silence(corpus) for split, corpus in read_corpus(files[""][0]).items()}
    return {split: chain.from_iterable(make_entries(release.read(path), path) for path in paths)
            for split, paths in files.items()}
