"""Read preferences: from our pairs and answers, or from preference data sets made elsewhere.

Such data sets have records with ``chosen`` and ``rejected``, as JSON lines or one JSON list, gzipped or not. In TRL's
format, ``prompt``, ``chosen`` and ``rejected`` are texts or lists of messages; the prompt may be a field or part of
both dialogs. In transcripts such as Anthropic's HH, turns begin with ``Human:`` and ``Assistant:``.
"""

import codecs
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cli import InputError
from corpora import LONGEST_LINE, JsonReader, open_data, read_lines, read_pieces
from dialogs import Utterance, merge_utterances
from feedback.answers import majority_preferences, read_answers
from feedback.pairs import beginnings, pair_name, read_pairs, report_left_out

ROLES = {"system": "system", "developer": "system",
         **dict.fromkeys(["user", "human", "prompter", "person", "customer"], "other"),
         **dict.fromkeys(["assistant", "bot", "gpt", "model", "ai", "chatbot", "agent"], "bot")}
SPEAKER = r"\s*(Human|User|Assistant|AI|Bot|System) ?:"  # the beginning of a turn in a transcript
PROMPTS = ("prompt", "question", "instruction")  # names of the field with the prompt
logger = logging.getLogger("feedback.preferences")


class Preferences(NamedTuple):
    """All pairs by name; the pairs with a better reply and its number; the number of other pairs by reason."""

    pairs: dict[str, dict]
    better: list[tuple[dict, int]]
    left_out: Counter


def read_preferences(path: str | Path, answers: Iterable[str | Path]) -> Preferences:
    """Read the preferences in a file of pairs and its ``answers``; data sets made elsewhere need no answers.

    Raises `InputError` if a file cannot be read or contains no pair.
    """
    if _is_made_elsewhere(path):
        return _made_elsewhere(Path(path))
    pairs = read_pairs(path)
    return Preferences(pairs, *majority_preferences(pairs, read_answers(answers, pairs)))


def _is_made_elsewhere(path: str | Path) -> bool:
    """Decide by the first record; our own files are never a JSON list. Other errors are left to the readers."""
    with open_data(path) as file:
        for line in iter(lambda: file.readline(LONGEST_LINE), b""):
            line = line.removeprefix(codecs.BOM_UTF8).strip()
            if line.startswith(b"["):
                return True
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                return isinstance(record, dict) and {"chosen", "rejected"} <= record.keys()
    return False


def _records(path: str | Path) -> Iterator[tuple[int, dict | None]]:
    """Yield the numbered objects, from 1, of JSON lines or a JSON list; None for anything else."""
    text = JsonReader(read_pieces(path), path)
    if text.next_character() == "[":
        for number, record in enumerate(text.elements(), 1):
            yield number, record if isinstance(record, dict) else None
        return
    for number, line in read_lines(path):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            yield number, record if isinstance(record, dict) else None


# ----------------------------------------------------------------------------------------------- made elsewhere


def _made_elsewhere(path: Path) -> Preferences:
    pairs, problems, prompts = {}, {}, set()
    for number, record in _records(path):
        try:
            if record is None:
                raise ValueError("that are no record")
            persona, history, replies = read_record(record)
        except ValueError as error:
            problems.setdefault(str(error), []).append(number)
            continue
        pair: dict = {"model": "", "data": str(path), "split": "", "dialog": number, "turn": 0, "persona": persona,
                "history": history, "replies": [{"text": text, "ids": [], "ended": True} for text in replies],
                "beginnings": beginnings(history)}
        if pair_name(pair) in pairs:
            problems.setdefault("that repeat an earlier one", []).append(number)
        pairs.setdefault(pair_name(pair), {"pair": pair_name(pair)} | pair)
        prompts.add(pair["beginnings"][-1])
    report_left_out(path, problems)
    if not pairs:
        raise InputError(f"{path}: none of its preferences can be used; write lines of "
                         '{"prompt": "…", "chosen": "…", "rejected": "…"}')
    logger.info("%s: preferences made elsewhere, %s pairs of %s dialogs; no answers are needed", path,
                f"{len(pairs):,}", f"{len(prompts):,}")
    left_out = Counter({problem.removeprefix("that "): len(numbers) for problem, numbers in problems.items()})
    return Preferences(pairs, [(pair, 1) for pair in pairs.values()], left_out)


def read_record(record: dict) -> tuple[list[str], list[str], list[str]]:
    """Return persona, history and [rejected, chosen] of a record; the persona is the system text, a sentence per line.

    Raises ``ValueError`` with the reason if the record is not a pair of replies to one dialog.
    """
    prompt_text = next((record[name] for name in PROMPTS if record.get(name)), [])
    prompt = said(prompt_text, "other")
    prompt = said(record.get("system") or [], "system") + prompt
    dialogs = []
    for name in ("rejected", "chosen"):
        value = record.get(name)
        if isinstance(value, str) and isinstance(prompt_text, str) and prompt_text and value.startswith(prompt_text):
            turns = prompt + said(value.removeprefix(prompt_text), "bot")
        else:
            turns = said(value, "bot")
            if not any(turn.speaker == "other" for turn in turns):  # only the reply, without its prompt
                turns = prompt + turns
            elif not any(turn.speaker == "system" for turn in turns):
                turns = [turn for turn in prompt if turn.speaker == "system"] + turns
        persona = [line for turn in turns if turn.speaker == "system" for line in turn.text.splitlines()]
        dialogs.append(([line.strip() for line in persona if line.strip()],
                        merge_utterances(turn for turn in turns if turn.speaker != "system")))
    (persona, rejected), (_, chosen) = dialogs
    if not all(turns and turns[-1].speaker == "bot" for turns in (rejected, chosen)):
        raise ValueError("that do not end with two replies of the bot")
    if dialogs[0][0] != dialogs[1][0] or rejected[:-1] != chosen[:-1]:
        raise ValueError("whose two dialogs differ before their last replies")
    if len(chosen) == 1:
        raise ValueError("without a message before the reply")
    if rejected == chosen:
        raise ValueError("with the same reply twice")
    return persona, [turn.text for turn in chosen[:-1]], [rejected[-1].text, chosen[-1].text]


def said(value: object, speaker: str) -> list[Utterance]:
    """Convert messages, a transcript or a plain text, said by ``speaker``, to turns of "system", "other" and "bot".

    Raises ``ValueError`` for anything else.
    """
    if isinstance(value, str):
        between = r"\n\n" if re.search(r"\n\n(Human|Assistant):", value) else r"\n"
        parts = re.split(rf"(?:\A|{between}){SPEAKER}", value)
        if len(parts) > 1 and not parts[0].strip():
            return [Utterance(ROLES[who.lower()], text) for who, text in zip(parts[1::2], parts[2::2], strict=True)]
        return [Utterance(speaker, value)]
    if not isinstance(value, Sequence) or not all(isinstance(message, dict) for message in value):
        raise ValueError("with a prompt or reply that is neither text nor messages")
    return [Utterance(*_message(message)) for message in value]


def _message(message: dict) -> tuple[str, str]:
    """Return the speaker and the text of a message; parts of the text are joined."""
    role = ROLES.get(str(message.get("role", message.get("from"))).lower())
    content = message.get("content", message.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "\n".join(part["text"] if isinstance(part.get("text"), str) else "" for part in content)
    if role is None or not isinstance(content, str):
        raise ValueError("with a message without text, or with a role other than system, user and assistant")
    return role, content
