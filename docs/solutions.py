"""Answers to the exercises of the tutorial; `tests/test_tutorial.py` runs them."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from corpora import read_lines
from decoding import Decoding, allowed_scores, choose_tokens, fitted_context, generate_replies, readable
from dialogs import Dialog, Utterance
from inputs import Segment, Specials
from readers import FORMATS, Format
from sequences import sequences_for
from shapes import read_persona
from words import normalized


@torch.inference_mode()
def min_p_reply(model, context: Segment, special: Specials, share: float, decoding: Decoding) -> list[int]:
    """Sample among the tokens that are at least ``share`` times as likely as the likeliest (Nguyen et al. 2024)."""
    prompt = Segment([*context.ids, special.speaker1], [*context.types, special.speaker1], context.start)
    sequences, reply = sequences_for(model, [prompt], 1, decoding.max_length), []
    logits = sequences.logits
    while len(reply) < decoding.max_length:
        scores = allowed_scores(logits, [decoding], [reply], special)
        chances = scores.softmax(-1)
        scores[chances < share * chances.max()] = -math.inf
        token = choose_tokens(scores, [decoding])[0]
        if token is None or token in special:
            break
        reply.append(token)
        if len(reply) < decoding.max_length:
            logits = sequences.step([token], special.speaker1)
    return reply


def ask(path: Path, question: str, model, tokenizer, decoding: Decoding) -> str:
    """Answer a question with the persona in a file, which has one sentence per line."""
    persona = tokenizer.encode_persona(read_persona(path.read_text("utf-8"), str(path)))
    special = Specials.of(tokenizer)
    context = fitted_context(model, persona, [tokenizer.encode(question)], special, decoding.max_length)
    return readable(tokenizer, generate_replies(model, [context], special, decoding)[0])


def persona_words(records: list[dict], split) -> float:
    """Return the share of replies with a new word of the persona: four letters or more, not said in the dialog yet."""
    used = 0
    for turn, record in enumerate(records):
        words = {word for text in split.texts("persona", split.turn_dialog[turn]) for word in normalized(text)}
        said = {word for text in split.texts("history", turn) for word in normalized(text)}
        used += any(len(word) > 3 and word in words - said for word in normalized(record["reply"]))
    return used / len(records)


def read_log(path: Path) -> Iterator[Dialog]:
    """Read the log of a chat program: lines such as ``[21:04] <anna> hi !``, with an empty line between dialogs."""
    place, turns = "", []
    for number, line in read_lines(path):
        if found := re.fullmatch(r"\[[\d:]+\] <(.+?)> (.*)", line.strip()):
            place = place if turns else f"line {number}"
            turns.append(Utterance(found[1], found[2]))
        elif not line.strip() and turns:
            yield Dialog(place, turns)
            turns = []
    if turns:
        yield Dialog(place, turns)


FORMATS["log"] = Format("a chat program's log", read_log)  # then: get_dataset(…, layout="log")
