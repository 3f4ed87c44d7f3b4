"""Read users' text files: an utterance or a dialog per line, numbered, with speakers' names, or with ParlAI's fields.

A reader takes the path of a file and yields its dialogs. `text_layout` finds out which reader fits a file.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cli import InputError
from corpora import open_data, read_lines
from dialogs import Dialog, Utterance, check_length, clean

SAMPLE_SIZE = 1 << 16  # bytes at the beginning of a file from which its layout is told
MAJORITY = 0.6  # the share of lines that must be in a layout
SEPARATORS = {name: re.compile(re.escape(name), re.IGNORECASE) for name in (
    "__eot__", "__eou__", "</t>", "<|endoftext|>", "<|eos|>", "<|eot|>", "<|sep|>", "</s>", "<eos>", "<eou>", "<eot>",
    "<sep>", "<turn>", "[EOS]", "[EOT]", "[SEP]", "[TURN]", "|||")}
SEPARATORS |= {"EOS": re.compile(r"(?:^|(?<=\s))EOS(?=\s|$)"), "\t": re.compile(r"\t")}
DIVIDER = re.compile(r"\s*([-=*_#~])\1{2,}\s*")  # a line drawn between dialogs
NUMBERED = re.compile(r"\s*[\[(]?([0-9]{1,9})(?:[.):\]](?![0-9])\s*|[\t ]\s*(?:[-–—]\s+)?)(.*)")
DAY, HOUR = r"\d{1,4}[/.-]\d{1,2}[/.-]\d{1,4}", r"\d{1,2}:\d{2}(?::\d{2})?(?:\s?[AaPp]\.?[Mm]\.?)?"
STAMP = rf"[\s\u200e]{{0,8}}[\[(]?(?:{DAY}(?:,?\s{{1,3}}|T))?{HOUR}[\])]?\s{{1,3}}(?:[-–]\s{{0,3}})?"
STAMPED = re.compile(STAMP)  # the beginning of a message in a messenger's export: a time, usually with a name
FACE = r"[\u2600-\u27bf\U0001f300-\U0001faff]\ufe0f?"
NAME = rf"[0-9]|(?:{FACE}){{1,3}}|(?:{FACE} ?)?[^\W\d_][\w.'’-]{{0,30}}(?: #?[\w.'’-]{{1,30}}){{0,3}}"
REMARK = r"(?:\s?[\[(][^\[\]()]{1,40}[\])])?"  # a remark after a name, such as (agent) or [10:05 PM]
LABELLED = re.compile(rf"(?:{STAMP})?(?:\s{{0,8}}<({NAME})>\s*|[\s\u200e#>*_\[(@•–-]{{0,8}}({NAME})\s{{0,3}}"
                      rf"[\])*_#]{{0,3}}{REMARK}\s{{0,3}}(?:[:：](?!//)|\t)[*_]{{0,3}}\s*)(.*)")
SYSTEM_LABELS = {"system", "developer", "persona", "personality", "your persona"}
YAML_KEYS = {"role", "content", "from", "value", "text", "speaker", "message", "messages", "name", "id", "dialog",
             "dialogs", "dialogue", "dialogues", "conversation", "conversations", "turns", "utterance", "utterances"}
# The marks before an utterance in chat templates: ChatML, Llama 3, Llama 2, Gemma, Zephyr, Vicuna, and plain tags.
WHO = r"user|human|assistant|bot|system|(?:speaker|person|user)[ _]?[12]"
MARKED = re.compile(
    r"<\|im_start\|>\s*(\w+)\n?|<\|start_header_id\|>\s*(\w+)\s*<\|end_header_id\|>|<start_of_turn>\s*(\w+)\n?|"
    rf"<\|?({WHO})\|?>\s*|(?:<s>)?(\[/?INST\])\s*|### ?(Human|Assistant|System|User|Instruction|Response): ?",
    re.IGNORECASE)
DASH = re.compile(r"\s*[-–—]\s+(.*)")


def read_sample(path: str | Path) -> bytes:
    """Return the first bytes of a file, unpacked."""
    with open_data(path) as file:
        return file.read(SAMPLE_SIZE)


def sample_lines(path: str | Path) -> list[str]:
    """Return the complete lines at the beginning of a file; bytes that are not UTF-8 are replaced."""
    start = read_sample(path)
    lines = start.decode("utf-8-sig", "replace").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if len(start) == SAMPLE_SIZE and len(lines) > 1 else lines


def share_of(lines: Iterable[str], fits: Callable[[str], object]) -> float:
    """Return the share of the non-empty lines for which ``fits`` is true."""
    written = [line for line in lines if line.strip()]
    return sum(map(bool, map(fits, written))) / max(1, len(written))


# ------------------------------------------------------------------------------------------------ an utterance per line


def blocks(path: str | Path, at_empty_lines: bool = True) -> Iterator[list[tuple[int, str]]]:
    """Yield blocks of numbered lines, separated by dividers (``---``) and, unless switched off, by empty lines."""
    block: list[tuple[int, str]] = []
    for number, line in read_lines(path):
        if line.strip() and not DIVIDER.fullmatch(line):
            block.append((number, line))
            check_length(block, path, f"line {block[0][0]}")
        elif block and (at_empty_lines or line.strip()):
            yield block
            block = []
    if block:
        yield block


def read_plain(path: str | Path) -> Iterator[Dialog]:
    """Read plain text: an utterance per line, two alternating speakers, an empty line between dialogs.

    If all lines begin with a dash, as in novels, the dashes are removed. A dialog may begin with lines ``your persona:
    …`` about the second speaker. Raises `InputError` if there is an empty line after every utterance.
    """
    lines = sample_lines(path)
    dashes = share_of(lines, DASH.fullmatch) == 1
    groups = re.split(r"\n\s*\n", "\n".join(lines).strip())
    if len(groups) > 3 and all("\n" not in group for group in groups):
        raise InputError(f"{path}: has an empty line after every line, so each dialog would have one utterance; leave "
                         "no empty lines within a dialog")
    for block in blocks(path):
        said = [DASH.sub(r"\1", line) if dashes else line for _, line in block]
        personas: dict[object, list[str]] = {}
        while said and (label := _label(said[0])) and label[0] in {*SYSTEM_LABELS, "partner's persona"}:
            personas.setdefault(int(label[0] != "partner's persona"), []).append(clean(label[1]))
            del said[0]
        yield Dialog(f"line {block[0][0]}", [Utterance(index % 2, line) for index, line in enumerate(said)], personas)


def read_numbered(path: str | Path) -> Iterator[Dialog]:
    """Read numbered lines, ``1 hello``, ``2. hi``, …; a dialog begins where the number does not increase."""
    for block in blocks(path):
        said, last = [], -1
        for number, line in block:
            if found := NUMBERED.fullmatch(line):
                if int(found[1]) <= last:
                    yield _numbered_dialog(said)
                    said = []
                last = int(found[1])
                said.append((number, found[2]))
            elif said:  # the utterance has several lines
                said[-1] = said[-1][0], f"{said[-1][1]} {line}"
            else:
                said.append((number, line))
        yield _numbered_dialog(said)


def _numbered_dialog(said: list[tuple[int, str]]) -> Dialog:
    """Make a dialog of (line number, utterance); the speakers alternate unless every utterance begins with a name."""
    place = f"line {said[0][0]}"
    texts = [text for _, text in said]
    if share_of(texts, LABELLED.fullmatch) == 1 and len({_label(text)[0] for text in texts}) == 2:
        return labelled_dialog(place, texts)
    return Dialog(place, [Utterance(index % 2, text) for index, text in enumerate(texts)])


def read_labelled(path: str | Path) -> Iterator[Dialog]:
    """Read lines such as ``Anna: hello``, with an empty line between dialogs.

    A line without a name continues the utterance before it. Dates and times before the name, which messengers export,
    are removed. If empty lines separate single utterances, only a divider, ``---``, separates dialogs.
    """
    looked = sample_lines(path)
    groups = [group.split("\n") for group in re.split(r"\n\s*\n", "\n".join(looked).strip())]
    alone = sum(len({_label(line)[0] for line in group if LABELLED.fullmatch(line)}) < 2 for group in groups)
    known = _labels(looked)
    for block in blocks(path, at_empty_lines=len(groups) < 3 or alone < 0.8 * len(groups)):
        yield labelled_dialog(f"line {block[0][0]}", [line for _, line in block], known)


def _label(line: str) -> tuple[str, str] | None:
    """Split a line that begins with a name into the name, in lower case, and the text; None for another line."""
    found = LABELLED.fullmatch(line)
    return ((found[1] or found[2]).casefold(), found[3]) if found else None


def _labels(said: Iterable[str]) -> Counter:
    """Count how often each label begins a line."""
    return Counter(label for label, _ in filter(None, map(_label, said)) if label not in SYSTEM_LABELS)


def _names(labels: Counter, known: Counter) -> dict[str, str]:
    """Find the labels of a dialog that are names. ``known``: how often each label begins a line in the whole file.

    Not every label before a colon is a name: of more than two labels, the two that occur repeatedly are the names.
    ``q1``, ``a1``, ``q2``, ``a2`` are two speakers.
    """
    if len(labels) > 2:
        for counts in (labels, known):
            often = {label: label for label in labels if counts[label] > 1}
            if len(often) == 2:
                return often
        numbers: dict[str, set[str]] = {}
        for label in labels:
            stem = label.rstrip("0123456789").rstrip()
            numbers.setdefault(stem, set()).add(label.removeprefix(stem).strip())
        if len(numbers) == 2 and "" not in numbers and len(set(map(frozenset, numbers.values()))) == 1:
            return {label: label.rstrip("0123456789").rstrip() for label in labels}
    return {label: label for label in labels}


def labelled_dialog(place: str, said: Iterable[str], known: Counter | None = None) -> Dialog:
    """Make a dialog from lines that mostly begin with a speaker's name; lines of a system become the persona.

    ``known``: as for `_names`. Messages of the messenger itself, which have a time but no name, are left out.
    """
    said = list(said)
    names = _names(_labels(said), known or Counter())
    turns: list[Utterance] = []
    persona: list[str] = []
    others: list[str] = []
    continued: list | None = None  # the persona that a line without a name continues
    for line in said:
        label, text = _label(line) or ("", line)
        if label in SYSTEM_LABELS or label == "partner's persona":
            continued = others if label == "partner's persona" else persona
            continued.append(clean(text))
        elif label in names:
            continued = None
            turns.append(Utterance(names[label], text))
        elif continued:
            continued.append(clean(line))
        elif turns and not STAMPED.match(line):
            turns[-1] = turns[-1]._replace(text=f"{turns[-1].text} {line}")
    personas = {}
    if persona and (who := answering_speaker(turns)):
        personas[who] = [sentence for sentence in persona if sentence]
    if others and turns:
        personas[turns[0].speaker] = [sentence for sentence in others if sentence]
    return Dialog(place, turns, personas)


USER_ROLES = {"user", "human", "prompter", "customer", "client"}
ASSISTANTS = {"assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "bing", "bard", "claude", "gemini"}


def answering_speaker(turns: list[Utterance]) -> object:
    """Return the speaker to whom a persona without a name belongs: the assistant, otherwise the second speaker."""
    speakers = list(dict.fromkeys(turn.speaker for turn in turns if turn.text.strip()))
    named = [who for who in speakers if str(who) in ASSISTANTS]
    return named[0] if len(named) == 1 else next(iter(speakers[1:2]), None)


# --------------------------------------------------------------------------------------------------- a dialog per line


def read_delimited(path: str | Path) -> Iterator[Dialog]:
    """Read a dialog per line, with tabs, ``</t>``, `` EOS `` or the like between utterances; two speakers alternate.

    Two kinds of numbers are left out: the weights ``0.0`` or ``1.0`` before each utterance of DialoGPT's data, and a
    dialog's number in the first column.
    """
    lines = [line for line in sample_lines(path) if line.strip()]
    name = separator_of(lines) or "\t"
    weighted = name == "EOS" and share_of(lines, re.compile(r"[01]\.[0-9]+ ").match) == 1
    firsts = [line.split("\t")[0].strip() for line in lines]
    numbered = name == "\t" and len(firsts) > 1 and all(map(str.isdecimal, firsts)) and all(
        int(after) == int(before) + 1 for before, after in zip(firsts, firsts[1:], strict=False))
    for number, line in read_lines(path):
        said = [text for part in SEPARATORS[name].split(line) for text in part.split("\t")][numbered:]
        if name == "__eot__":  # it ends a speaker's turn, which has several utterances
            said = [text.replace("__eou__", " ") for text in said]
        if weighted:
            said = [re.sub(r"^\s*[01]\.[0-9]+ ", "", text) for text in said]
        while said and not said[-1].strip():
            del said[-1]
        if said and all(map(str.strip, said)):
            yield _numbered_dialog([(number, text) for text in said])
        elif said:
            yield Dialog(f"line {number}", [Utterance(index % 2, text) for index, text in enumerate(said)])


def separator_of(lines: list[str]) -> str | None:
    """Return the name in `SEPARATORS` of the separator that most of the lines contain, or None."""
    return next((name for name, pattern in SEPARATORS.items()
                 if share_of(map(str.strip, lines), pattern.search) >= MAJORITY), None)


# ------------------------------------------------------------------------------------------------- ParlAI's fields


FIELD = re.compile(r"(?:^|\t)(text|labels|eval_labels|label_candidates|candidates|episode_done|reward|id|[a-z_]+):")


def read_parlai_fields(path: str | Path) -> Iterator[Dialog]:
    """Read ParlAI's text, a line per turn: ``text:the other's utterance<tab>labels:reply<tab>episode_done:True``.

    ``episode_done:True`` or an empty line ends a dialog. ``label_candidates`` are separated by ``|``. Lines within the
    text that begin with ``your persona:`` give the bot's persona.
    """
    turns: list[Utterance] = []
    personas: dict[object, list[str]] = {"bot": [], "other": []}
    place = ""

    def ended() -> Dialog:
        return Dialog(place, turns, personas, "bot")

    open_episode = False  # whether the last line said that the episode continues
    for number, line in read_lines(path):
        if not line.strip():
            if turns and not open_episode:
                yield ended()
                turns, personas = [], {"bot": [], "other": []}
            continue
        found = list(FIELD.finditer(line))
        if not found or found[0].start() or not {"text", "labels", "eval_labels"} & {one[1] for one in found}:
            raise InputError(f"{path}: line {number} has no text:… or labels:…, as lines of ParlAI have; write "
                             "text:an utterance<tab>labels:the reply")
        ends = [one.start() for one in found[1:]] + [len(line)]
        fields = {one[1]: line[one.end():end] for one, end in zip(found, ends, strict=True)}
        place = place if turns else f"line {number}"
        said = []
        for one in _unescaped(fields.get("text", "")).split("\n"):
            if one.startswith(("your persona:", "partner's persona:")):
                whose, _, sentence = one.partition(":")
                personas["bot" if whose == "your persona" else "other"].append(clean(sentence))
            else:
                said.append(one)
        reply = _listed(fields.get("labels") or fields.get("eval_labels") or "")
        gold = clean(reply[0]) if reply else ""
        others = map(clean, _listed(fields.get("label_candidates") or fields.get("candidates") or ""))
        turns += [Utterance("other", " ".join(said)),
                  Utterance("bot", gold, tuple(other for other in others if other not in ("", gold)))]
        check_length(turns, path, place)
        done = fields.get("episode_done", "").strip().casefold()
        open_episode = done == "false"
        if done == "true":
            yield ended()
            turns, personas = [], {"bot": [], "other": []}
    if turns:
        yield ended()


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", " ").replace("__PIPE__", "|")


def _listed(text: str) -> list[str]:
    return [_unescaped(one) for one in text.split("|")] if text else []


# ------------------------------------------------------------------------------------------------- telling layouts


def text_layout(lines: list[str]) -> str:
    """Return the name in `readers.FORMATS` of the layout that the first lines of a text file are in."""
    written = [line for line in lines if line.strip() and not DIVIDER.fullmatch(line)]
    first = written[0] if written else ""
    if share_of(written, lambda line: re.match(r"(text|labels|eval_labels):", line) or "\tlabels:" in line) >= MAJORITY:
        return "parlai_fields"
    if re.match(r"1 (your persona: |partner's persona: |.*\t)", first):
        return "parlai"
    if "__eou__" in first and "__eot__" not in first:
        return "dailydialog"
    if share_of(written, lambda line: len(MARKED.findall(line)) > 1) >= MAJORITY:
        return "marked"
    separator = separator_of(written)
    if separator == "\t" and _names_before_tabs(lines):
        return "labelled"
    if separator not in (None, "\t"):
        return "delimited"
    numbers = [int(number[1]) if (number := NUMBERED.fullmatch(line)) else None for line in written]
    if len(set(numbers)) == 2 and set(numbers) <= {0, 1, 2} and len(numbers) > 2 and share_of(
            written, re.compile(r"\s*[0-2]\s*[:：]").match) == 1:
        return "labelled"  # the labels are numbers of speakers
    steps = [one is not None and (one in (0, 1) or before is not None and one == before + 1)
             for before, one in zip([None, *numbers], numbers, strict=False)]
    if len(written) > 1 and numbers[0] in (0, 1) and sum(steps) >= 0.9 * len(written) and max(
            line.count("\t") for line in written) < 2:
        return "numbered"
    if separator:
        return "delimited"
    if MARKED.match(first) and not LABELLED.match(first):
        return "marked"
    labels = _labels(written)
    if labels.keys() <= YAML_KEYS:
        return "plain"  # or rather YAML, which `foreign_format` tells
    if len(written) > 1 and (
            share_of(written, LABELLED.fullmatch) >= MAJORITY or share_of(written, STAMPED.match) >= MAJORITY
            or _label(first) and len(labels) == 2 and sum(labels.values()) > 2):  # names on lines of their own
        return "labelled"
    return "plain"


def _names_before_tabs(found: list[str]) -> bool:
    """Return whether each line has one of two speakers' names, a tab and an utterance, and not just two utterances."""
    rows = [line.split("\t") for line in found if line.strip()]
    names = {row[0].strip().casefold() for row in rows}
    blank = any(not line.strip() for line in "\n".join(found).strip().split("\n"))
    known = USER_ROLES | ASSISTANTS | {"q", "agent", "system"}
    return len(names) == 2 and all(len(row) == 2 for row in rows) and (
        blank or all(name in known or re.fullmatch(r"\w|.{0,12}\d", name) for name in names))


FOREIGN_FORMATS = [  # patterns that fit most lines of other kinds of files, but never of plain text
    (r"\s*[{\[<]", "JSON or markup that is cut at line breaks"),
    (r".* \+\+\+\$\+\+\+ ", "the Cornell Movie-Dialogs Corpus"),
    (rf"\s*- - |\s*-? ?({'|'.join(sorted(YAML_KEYS))})\s*:|.*[\w ]:\s*$", "YAML"),
    (r"\s*(import |from \w+ import |def |class |function |#include|[})\]]|//|#!)|.*[;{(\[]\s*$|.*\w\(.*\)\s*:?\s*$|"
     r"\s*[\w.]+ ?= ?[\w\"'\[{(]", "source code"),
    (r".*[;|].*[;|]", "a table"),
    (r".*\t", "a table or dialogs divided by tabs"),
]


def foreign_format(lines: list[str]) -> str | None:
    """Describe the kind of file that most of the lines look like if they are not dialogs in plain text, or None."""
    if sum(" --> " in line for line in lines) > max(1, len(lines) / 10):
        return "subtitles"
    return next((what for pattern, what in FOREIGN_FORMATS if share_of(lines, re.compile(pattern).match) > 0.5), None)
