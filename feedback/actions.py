"""Treat a reply as a sequence of actions, its tokens and its end: packing, probabilities, sampling.

`feedback.policy` trains with these, and `feedback.judge` scores replies with them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from decoding import Decoding, generate_replies
from inputs import IGNORED, Row, Specials, build_context, collate, pack_turn
from model import DoubleHeadsModel, autocast

NEVER = -1e9  # log-probability of impossible actions; finite, so that 0 · NEVER is 0


class ReplyTokens(NamedTuple):
    """The token ids of a reply, and whether it ended by itself or was cut at the maximum length."""

    ids: list[int]
    ended: bool


class Context(NamedTuple):
    """A context with its replies: as token ids, cut so that a reply fits, and as texts with the whole history."""

    persona: list[list[int]]
    history: list[list[int]]
    texts: tuple[list[str], list[str]]
    replies: list[ReplyTokens]


class Actions(NamedTuple):
    """The actions of a batch of replies, (replies, steps), padded on the right; replies to one context are adjacent."""

    tokens: torch.Tensor  # the chosen token; <eos> for the end
    mask: torch.Tensor  # True for actions, False for padding
    place: torch.Tensor  # the action's row in the logits that `PolicyNetwork` returns for `batch`
    batch: dict[str, torch.Tensor]  # from `inputs.collate`


def label_replies(row: Row, replies: Sequence[ReplyTokens]) -> tuple[Row, list[range]]:
    """Label the actions of all replies in a row of `pack_turn`; return the row and each reply's range of labels.

    The end of a reply that was cut is not labelled, because the policy did not choose it. Equal replies share a segment
    of the row, and so their labels.
    """
    labels, ranges = [IGNORED] * len(row.labels), []
    for reply, last in zip(replies, row.mc_token_ids[0], strict=True):
        first = last - len(reply.ids)
        stop = last + reply.ended
        labels[first:stop] = row.input_ids[first:stop]
        ranges.append(range(first, stop))
    labelled = np.cumsum([label != IGNORED for label in labels])
    return row._replace(labels=labels), [range(labelled[where.start] - 1, labelled[where.start] - 1 + len(where))
                                         if len(where) else range(0) for where in ranges]


def pack_actions(turns: Sequence[Context], special: Specials, model: DoubleHeadsModel) -> Actions:
    """Pack all replies of ``turns``: a row holds a context once and all replies to it."""
    rows, places, tokens, offset = [], [], [], 0
    for turn in turns:
        row = pack_turn(turn.persona, turn.history, [reply.ids for reply in turn.replies], special,
                        model.max_positions, model.history_start)
        row, ranges = label_replies(row, turn.replies)
        rows.append(row)
        for reply, where in zip(turn.replies, ranges, strict=True):
            places.append([offset + place for place in where])
            tokens.append(reply.ids + [special.eos] * reply.ended)
        offset += sum(label != IGNORED for label in row.labels)
    steps = max(map(len, tokens))

    def padded(values: list[list[int]]) -> torch.Tensor:
        return torch.tensor([row + [0] * (steps - len(row)) for row in values], device=model.device)

    mask = padded([[1] * len(row) for row in tokens]).bool()
    batch = {name: tensor.to(model.device) for name, tensor in collate(rows, special.pad).items()
             if not name.startswith("mc_")}  # the choice head is not needed
    return Actions(padded(tokens), mask, padded(places), batch)


class PolicyNetwork(nn.Module):
    """A policy with a value head, which predicts the remaining reward from the hidden states.

    The value head starts at 0 and is not saved with the result. Dropout is off, so that the policy is one fixed
    distribution. ``fp16``: the precision of the computation, as in `model.autocast`; the results are float32.
    """

    def __init__(self, model: DoubleHeadsModel, fp16: str = ""):
        super().__init__()
        self.model, self.fp16 = model.eval(), fp16
        self.value = nn.Linear(model.get_output_embeddings().weight.shape[1], 1, device=model.device)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute logits (labels, vocabulary) and values (labels,) of a packed batch, in the order of its labels."""
        states = []
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
        try:
            with autocast(str(self.model.device), self.fp16):
                logits = self.model(**batch).logits
        finally:
            hook.remove()
        return logits, self.value(states[0].float())[:, 0]


def action_logprobs(logits: torch.Tensor, special: Specials) -> torch.Tensor:
    """Convert logits (…, vocabulary) to log-probabilities of actions, of the same shape.

    Any control token ends a reply, so together they are one action, at the index of ``<eos>``.
    """
    logprobs = logits.log_softmax(-1)
    ends = logprobs[..., list(special)].logsumexp(-1, keepdim=True)
    control = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    control[list(special)] = True
    logprobs = logprobs.masked_fill(control, NEVER)
    return torch.cat([logprobs[..., :special.eos], ends, logprobs[..., special.eos + 1:]], -1)


def chosen_logprobs(logprobs: torch.Tensor, actions: Actions) -> torch.Tensor:
    """Select the log-probabilities of the chosen actions: (labels, vocabulary) → (replies, steps); 0 for padding."""
    return logprobs[actions.place, actions.tokens] * actions.mask


def divergence(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return KL(policy ‖ reference) in nats, given action log-probabilities (…, vocabulary); the result is (…).

    It is the sum over the whole vocabulary and not an estimate from the sampled token. Summed over the steps of
    sampled replies, it has the same mean as the log-ratio of whole replies, with less variance. The form
    Σ p (q/p - 1 - log q/p) has no negative terms, so rounding cannot make it negative.
    """
    ratio = (reference - policy).clamp(max=80.0)  # above this, p is 0 in float32
    return (policy.exp() * (ratio.expm1() - ratio)).sum(-1)


@torch.no_grad()
def sample_replies(network: PolicyNetwork, turns: Sequence[Context], special: Specials, max_length: int,
                   samples: int) -> list[Context]:
    """Sample replies to each of ``turns`` from the policy's own distribution, without filters or temperature."""
    how, model = Decoding(temperature=1.0, top_p=0.0, max_length=max_length, min_length=0), network.model
    contexts = [build_context(turn.persona, turn.history, special, model.history_start) for turn in turns]
    with autocast(str(model.device), network.fp16):
        ids = generate_replies(model, contexts, special, how, samples=samples)
    replies = [ReplyTokens(one, len(one) < max_length) for one in ids]
    return [turn._replace(replies=replies[place * samples:(place + 1) * samples]) for place, turn in enumerate(turns)]
