"""What the model makes of replies: both heads' scores, the alternatives of each token, what it looks at.

One forward pass over a packed row, beside the decoding; one at a time, so that it takes little from those who wait.
"""

import json
import math
import threading
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import torch
from torch import nn

from decoding import Decoding, allowed_scores
from inputs import IGNORED, Segment, Specials, collate, find_gold_places, pack_candidates
from layers import extend_attention_, usual_attention
from model import DoubleHeadsModel
from web.bot import Bot

NOTED = "_noted"  # in the name of an attention, behind that of what computes it
LONGEST = 1024  # tokens of a row that is looked at
SHOWN = 8  # alternatives of a token
_notes = threading.local()
_one_at_a_time = threading.Lock()


class Reading(NamedTuple):
    """What the model says of one candidate.

    ``choice``: the choice head's score; ``logits`` (tokens + 1, vocabulary) float32: what each of its tokens, and its
    end, was to be predicted with; ``likelihood``: their mean log-probability, in nats.
    """

    choice: float
    logits: torch.Tensor
    likelihood: float


class Spoken(NamedTuple):
    """A reply and all that is needed to look at it again: token ids, no text."""

    persona: list[list[int]]
    context: Segment
    tokens: list[int]
    ended: bool
    options: Decoding


def note_attention_(model: DoubleHeadsModel) -> None:
    """Let `read` see what the model attends to, in place."""
    extend_attention_(model, NOTED, _attend_and_note)


def _attend_and_note(attention: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     attention_mask: torch.Tensor, scaling: float | None = None, **how):
    """Attention, in the interface of transformers, whose weights `read` adds up where it wants them.

    ``query`` (batch, heads, tokens, size), ``key`` (batch, key heads, tokens, size). The weights are the mean over
    the heads; what some families do beside the softmax is left out of them.
    """
    if scaling is not None:
        how["scaling"] = scaling
    if (weights := getattr(_notes, "weights", None)) is not None:
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1).float()
        scores = query.float() @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        mask = attention_mask if attention_mask.dtype != torch.bool else torch.where(attention_mask, 0.0, -math.inf)
        weights.append((scores + mask).softmax(-1).mean(1)[0])
    return usual_attention(attention, module)(module, query, key, value, attention_mask, **how)


@torch.inference_mode()
def read(model: DoubleHeadsModel, special: Specials, context: Segment, candidates: Sequence[Sequence[int]],
         attention: bool = False) -> tuple[list[Reading], torch.Tensor | None]:
    """What both heads say of each candidate, computed in one row.

    With ``attention``, also where the last candidate's tokens and its end were predicted from: (tokens + 1, positions
    of the row), mean over layers and heads.
    """
    row = pack_candidates(context, candidates, special)
    batch = collate([row], special.pad)
    ids, segments = batch["input_ids"], batch["segment_ids"]
    within = (segments[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])
    batch["labels"][:, 1:] = torch.where(within, ids[:, 1:], IGNORED)
    places = batch["gold_places"] = find_gold_places(batch["labels"])
    with _one_at_a_time:
        _notes.weights = [] if attention else None
        try:
            out = model(**{name: values.to(model.device) for name, values in batch.items()})
            noted = _notes.weights
        finally:
            _notes.weights = None
    gold = out.logits.log_softmax(-1).gather(-1, ids[0, places + 1, None].to(model.device))[:, 0]
    numbers = {tuple(candidate): number for number, candidate in enumerate(dict.fromkeys(map(tuple, candidates)), 1)}
    own = [(segments[0, places] == numbers[tuple(candidate)]).to(model.device) for candidate in candidates]
    readings = [Reading(choice, out.logits[mine], gold[mine].mean().item())
                for choice, mine in zip(out.mc_logits[0].tolist(), own, strict=True)]
    if not noted:
        return readings, None
    return readings, torch.stack(noted).mean(0)[places[own[-1].cpu()]]


# ----------------------------------------------------------------------------------------------- as people see it


def what_it_saw(bot: Bot, spoken: Spoken, others: Sequence[list[int]]) -> str:
    """A reply's sequence, the choice head's score and the alternatives of its tokens, as HTML.

    ``others``: replies to other dialogs, with which the choice head compares this one.
    """
    if spoken.context.opened:
        return ("<div class=seen><p>This model is asked in its own chat template, into which the page cannot look."
                "</p></div>")
    context, said = spoken.context, [*spoken.tokens, *[bot.special.eos] * spoken.ended]
    others = [other for other in others if other != spoken.tokens]
    length = len(context.ids) + sum(len(one) + 2 for one in (*others, spoken.tokens))
    if length > LONGEST:
        return (f"<div class=seen><p>This takes {length:,} tokens; the page looks at {LONGEST:,} at most. Begin a new "
                "conversation to see inside again.</p></div>")
    readings, weights = read(bot.model, bot.special, context, [*others, spoken.tokens], attention=True)
    sentences = _places(spoken.persona, context, bot.special)
    steps = _steps(bot, spoken, readings[-1].logits[:len(said)], said)
    for step, row in zip(steps, weights if weights is not None else [None] * len(steps), strict=False):
        step |= _draws(bot, row, sentences, context)
    segments = _segments(bot, spoken, said, sentences, steps)
    return (f"<div class=seen>{_choice(readings)}<h3>The sequence</h3><p class=faint>Choose a token of the reply to see"
            f" what else it could have been, and on which sentence it draws.</p><ol>{segments}</ol><p class=draws "
            "role=status></p><table><caption></caption><thead><tr><th scope=col>token</th><th scope=col>before</th>"
            "<th scope=col>after</th><td></td></tr></thead><tbody></tbody></table></div>")


def _choice(readings: list[Reading]) -> str:
    mine, others = readings[-1].choice, [one.choice for one in readings[:-1]]
    told = f"<h3>The choice head</h3><p>gives this reply <b>{mine:.1f}</b>"
    if others:
        rank = 1 + sum(other >= mine for other in others)
        told += (f" and {len(others)} replies of other dialogs {min(others):.1f} to {max(others):.1f}: "
                 f"number {rank} of {len(others) + 1}")
    return f"{told}.</p>"


def _steps(bot: Bot, spoken: Spoken, logits: torch.Tensor, said: list[int]) -> list[dict]:
    """Of each token: itself and the likeliest ones, as the model gave them, and after temperature and filter."""
    before = logits.softmax(-1)
    after = allowed_scores(logits, [spoken.options] * len(said), [said[:place] for place in range(len(said))],
                           bot.special).softmax(-1)
    steps = []
    for place, token in enumerate(said):
        likeliest = before[place].topk(min(SHOWN, before.shape[1])).indices.tolist()
        words = [[word(bot, one), round(before[place, one].item(), 4), round(after[place, one].item(), 4)]
                 for one in dict.fromkeys([*likeliest, token])]
        steps.append({"token": word(bot, token), "words": words})
    return steps


def _places(persona: list[list[int]], context: Segment, special: Specials) -> list[slice]:
    """Where each sentence of the personality stands in the context; those that had no room are left out."""
    speakers = (special.speaker1, special.speaker2)
    end = next((place for place, token in enumerate(context.ids) if token in speakers), len(context.ids))
    places, start = [], 1
    for sentence in persona:
        if start + len(sentence) > end:
            break
        places.append(slice(start, start + len(sentence)))
        start += len(sentence)
    return places


def _draws(bot: Bot, weights: torch.Tensor | None, sentences: list[slice], context: Segment) -> dict:
    """How much of a token's attention went to each sentence of the personality, and that in words."""
    if weights is None or not sentences:
        return {"draws": [], "told": ""}
    each = torch.stack([weights[place].sum() for place in sentences])
    total = each.sum().item()
    shares = (each / max(total, 1e-9)).tolist()
    best = max(range(len(shares)), key=shares.__getitem__)
    text = bot.tokenizer.decode(context.ids[sentences[best]]).strip()
    return {"draws": [round(share, 3) for share in shares],
            "told": f"{total:.0%} of its attention goes to the personality, {shares[best]:.0%} of that to “{text}”"}


def _segments(bot: Bot, spoken: Spoken, said: list[int], sentences: list[slice], steps: list[dict]) -> str:
    """The sequence's parts, as items of a list: whose they are, and their tokens."""
    special, context = spoken_names(bot.special), spoken.context
    parts: list[tuple[str, list[str]]] = [("persona", [])]
    begins, ends = {place.start for place in sentences}, {place.stop - 1 for place in sentences}
    for place, (token, role) in enumerate(zip(context.ids, context.types, strict=True)):
        if token in special:
            parts.append((special[token], []))
        spelt = _token(bot, token, context.start + place, role)
        parts[-1][1].append("<span class=sentence>" * (place in begins) + spelt + "</span>" * (place in ends))
    position, role = context.start + len(context.ids), bot.special.speaker1
    own = [_token(bot, role, position, role)]
    own += [_token(bot, token, position + place, role, step)
            for place, (token, step) in enumerate(zip(said, steps, strict=True), 1)]
    parts.append(("bot", own))
    return "".join(f"<li class={name}><b>{'reply' if number == len(parts) else name}</b>{' '.join(tokens)}</li>"
                   for number, (name, tokens) in enumerate(parts, 1))


def spoken_names(special: Specials) -> dict[int, str]:
    return {special.speaker1: "bot", special.speaker2: "user"}


def _token(bot: Bot, token: int, position: int, role: int, step: dict | None = None) -> str:
    title = f"token {token}, position {position}, type {word(bot, role)}"
    inner = f"{escape(word(bot, token))}<sub>{position}</sub>"
    if step is None:
        return f"<span class=token title='{escape(title)}'>{inner}</span>"
    return (f"<button class=token aria-pressed=false title='{escape(title)}' "
            f"data-step='{escape(json.dumps(step, ensure_ascii=False))}'>{inner}</button>")


def word(bot: Bot, token: int) -> str:
    return bot.tokenizer.decode([token]) or bot.tokenizer.convert_ids_to_tokens(token)
