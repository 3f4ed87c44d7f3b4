"""Look into a reply: both heads' scores, the alternatives of each token, and the attention to the personality.

This takes one forward pass over a packed row, besides the decoding. Only one such pass runs at a time, so that replies
are hardly delayed.
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

NOTED = "_noted"  # suffix of the attention's name
LONGEST = 1024  # tokens of the longest row computed
SHOWN = 8  # alternatives shown per token
_notes = threading.local()
_one_at_a_time = threading.Lock()


class Reading(NamedTuple):
    """The model's scores of one candidate.

    ``choice``: the choice head's score; ``logits`` (tokens + 1, vocabulary) float32: the predictions of the candidate's
    tokens and of its end; ``likelihood``: mean log-probability of these, in nats.
    """

    choice: float
    logits: torch.Tensor
    likelihood: float


class InspectedReply(NamedTuple):
    """A reply, as token ids, with all that is needed to compute it again."""

    persona: list[list[int]]
    context: Segment
    tokens: list[int]
    ended: bool
    options: Decoding


def note_attention_(model: DoubleHeadsModel) -> None:
    """Let `read` collect the model's attention weights, in place."""
    extend_attention_(model, NOTED, _attend_and_note)


def _attend_and_note(attention: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     attention_mask: torch.Tensor, scaling: float | None = None, **how):
    """Compute attention in the interface of transformers, and note the weights if `read` collects them.

    ``query`` (batch, heads, tokens, size), ``key`` (batch, key heads, tokens, size). The weights are means over the
    heads. They ignore what some families add to the softmax, such as caps and sinks.
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
    """Score each candidate with both heads, in one row.

    With ``attention``, return also the attention weights from which the last candidate's tokens and end were predicted:
    (tokens + 1, positions of the row), mean over layers and heads.
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


# ----------------------------------------------------------------------------------------------- as HTML


def inspection_html(bot: Bot, reply: InspectedReply, others: Sequence[list[int]]) -> str:
    """Return a reply's sequence, the choice head's score and the alternatives of each token, as HTML.

    ``others``: replies of other dialogs, with which the choice head compares this reply.
    """
    if reply.context.opened:
        return "<div class=seen><p>The page cannot look into a model that uses its own chat template.</p></div>"
    context, said = reply.context, [*reply.tokens, *[bot.special.eos] * reply.ended]
    others = [other for other in others if other != reply.tokens]
    length = len(context.ids) + sum(len(one) + 2 for one in (*others, reply.tokens))
    if length > LONGEST:
        return (f"<div class=seen><p>This conversation takes {length:,} tokens; the page shows at most {LONGEST:,}. "
                "Begin a new conversation to see inside again.</p></div>")
    readings, weights = read(bot.model, bot.special, context, [*others, reply.tokens], attention=True)
    sentences = _sentence_places(reply.persona, context, bot.special)
    steps = _steps(bot, reply, readings[-1].logits[:len(said)], said)
    for step, row in zip(steps, weights if weights is not None else [None] * len(steps), strict=False):
        step |= _persona_attention(bot, row, sentences, context)
    segments = _segments(bot, reply, said, sentences, steps)
    return (f"<div class=seen>{_choice(readings)}<h3>The sequence</h3><p class=faint>Choose a token of the reply to see"
            f" its alternatives, and the sentences that it draws on.</p><ol>{segments}</ol><p class=draws "
            "role=status></p><table><caption></caption><thead><tr><th scope=col>token</th><th scope=col>before</th>"
            "<th scope=col>after</th><td></td></tr></thead><tbody></tbody></table></div>")


def _choice(readings: list[Reading]) -> str:
    own, others = readings[-1].choice, [one.choice for one in readings[:-1]]
    html = f"<h3>The choice head</h3><p>gives this reply <b>{own:.1f}</b>"
    if others:
        rank = 1 + sum(other >= own for other in others)
        html += (f" and {len(others)} replies of other dialogs {min(others):.1f} to {max(others):.1f}: "
                 f"number {rank} of {len(others) + 1}")
    return f"{html}.</p>"


def _steps(bot: Bot, reply: InspectedReply, logits: torch.Tensor, said: list[int]) -> list[dict]:
    """Return each token with the probabilities of its alternatives, before and after temperature and filter."""
    before = logits.softmax(-1)
    after = allowed_scores(logits, [reply.options] * len(said), [said[:place] for place in range(len(said))],
                           bot.special).softmax(-1)
    steps = []
    for place, token in enumerate(said):
        likeliest = before[place].topk(min(SHOWN, before.shape[1])).indices.tolist()
        alternatives = [[spelling(bot, one), round(before[place, one].item(), 4), round(after[place, one].item(), 4)]
                        for one in dict.fromkeys([*likeliest, token])]
        steps.append({"token": spelling(bot, token), "alternatives": alternatives})
    return steps


def _sentence_places(persona: list[list[int]], context: Segment, special: Specials) -> list[slice]:
    """Return the place of each sentence of the personality in the context, without the sentences that did not fit."""
    speakers = (special.speaker1, special.speaker2)
    end = next((place for place, token in enumerate(context.ids) if token in speakers), len(context.ids))
    places, start = [], 1
    for sentence in persona:
        if start + len(sentence) > end:
            break
        places.append(slice(start, start + len(sentence)))
        start += len(sentence)
    return places


def _persona_attention(bot: Bot, weights: torch.Tensor | None, sentences: list[slice], context: Segment) -> dict:
    """Return how a token's attention to the personality is divided among the sentences: shares, and a summary."""
    if weights is None or not sentences:
        return {"shares": [], "summary": ""}
    each = torch.stack([weights[place].sum() for place in sentences])
    total = each.sum().item()
    shares = (each / max(total, 1e-9)).tolist()
    best = max(range(len(shares)), key=shares.__getitem__)
    text = bot.tokenizer.decode(context.ids[sentences[best]]).strip()
    return {"shares": [round(share, 3) for share in shares],
            "summary": f"{total:.0%} of its attention goes to the personality, {shares[best]:.0%} of that to “{text}”"}


def _segments(bot: Bot, reply: InspectedReply, said: list[int], sentences: list[slice], steps: list[dict]) -> str:
    """Return the parts of the sequence as list items: the speaker's name and the tokens."""
    special, context = speaker_names(bot.special), reply.context
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


def speaker_names(special: Specials) -> dict[int, str]:
    return {special.speaker1: "bot", special.speaker2: "user"}


def _token(bot: Bot, token: int, position: int, role: int, step: dict | None = None) -> str:
    title = f"token {token}, position {position}, type {spelling(bot, role)}"
    inner = f"{escape(spelling(bot, token))}<sub>{position}</sub>"
    if step is None:
        return f"<span class=token title='{escape(title)}'>{inner}</span>"
    return (f"<button class=token aria-pressed=false title='{escape(title)}' "
            f"data-step='{escape(json.dumps(step, ensure_ascii=False))}'>{inner}</button>")


def spelling(bot: Bot, token: int) -> str:
    """Return the text of a single token, or the name of a control token."""
    return bot.tokenizer.decode([token]) or bot.tokenizer.convert_ids_to_tokens(token)
