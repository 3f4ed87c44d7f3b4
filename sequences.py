"""The forward passes of decoding: many contexts at once without padding, then one token per reply and pass.

Knows token ids, keys and values; `decoding` chooses the tokens.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from inputs import Segment
from model import DoubleHeadsModel

PASS = 512  # new tokens of contexts in one forward pass: activations stay in the processor's cache
IN_STEP = "_in_step"  # in the name of an attention, behind that of the attention that it extends


class Part(NamedTuple):
    """One context in the row of tokens of a forward pass."""

    slot: int  # where its keys and values lie
    source: int  # the slot of a context that begins with the same tokens
    shared: int  # how many tokens those are; they are copied from there
    tokens: slice  # where its other tokens lie in the row
    length: int  # of the whole context


class Sequences:
    """Contexts, and for each of them ``copies`` replies that grow by one token per `step`.

    ``logits``: what the model predicts after each context, (contexts, vocabulary). The contexts are computed as one
    row of tokens, and what several of them begin with is computed once. A reply's row is number context · copies +
    copy; all copies read the keys and values of their context from one place.
    """

    def __init__(self, model: DoubleHeadsModel, contexts: Sequence[Segment], copies: int, longest: int):
        """``longest``: the most tokens that a reply can have."""
        self.model, self.copies, self.longest = model, copies, longest
        self.starts = [context.start for context in contexts]
        self.lengths = [len(context.ids) for context in contexts]
        self.width, self.steps = max(self.lengths), 0
        self.of_contexts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer → keys, values
        self.of_replies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.parts: list[Part] = []  # of the pass over contexts that is being computed
        self.logits = self._read(contexts)

    def _read(self, contexts: Sequence[Segment]) -> torch.Tensor:
        def sequence(slot: int) -> list[tuple[int, int]]:
            return list(zip(contexts[slot].ids, contexts[slot].types, strict=True))

        order = sorted(range(len(contexts)), key=lambda slot: (contexts[slot].start, sequence(slot)))
        logits, tokens, before = [], 0, None
        for place, slot in enumerate(order):
            shared = 0
            if before is not None and contexts[before].start == contexts[slot].start:
                both = zip(sequence(before), sequence(slot)[:-1], strict=False)  # the last token is always computed
                shared = next((n for n, (one, other) in enumerate(both) if one != other),
                              min(self.lengths[before], self.lengths[slot] - 1))
            new = self.lengths[slot] - shared
            self.parts.append(Part(slot, slot if before is None else before, shared, slice(tokens, tokens + new),
                                   self.lengths[slot]))
            tokens, before = tokens + new, slot
            if tokens >= PASS or place == len(order) - 1:
                logits.append(self._pass(contexts))
                self.parts, tokens = [], 0
        back = torch.tensor(order).argsort().to(self.model.device)
        return torch.cat(logits)[back]

    def _pass(self, contexts: Sequence[Segment]) -> torch.Tensor:
        """Compute ``parts``; returns the logits after the last token of each."""
        ids = [token for part in self.parts for token in contexts[part.slot].ids[part.shared:]]
        types = [kind for part in self.parts for kind in contexts[part.slot].types[part.shared:]]
        columns = [column for part in self.parts for column in range(part.shared, part.length)]
        starts = [contexts[part.slot].start for part in self.parts for _ in range(part.shared, part.length)]
        device = self.model.device
        places, seen = torch.tensor(columns, device=device)[None], torch.arange(self.width, device=device)[None]
        states = self.model.read(
            torch.tensor([ids], device=device), token_type_ids=torch.tensor([types], device=device),
            position_ids=places + torch.tensor([starts], device=device), use_cache=True, past_key_values=self,
            attention_mask=self._mask(seen[None, None] <= places[:, None, :, None], places, seen),
        ).last_hidden_state
        return self._vocabulary_logits(states[0, [part.tokens.stop - 1 for part in self.parts]])

    def step(self, tokens: Sequence[int], kind: int) -> torch.Tensor:
        """Add one token of type ``kind`` to each row; returns the logits of the next ones, (rows, vocabulary)."""
        device = self.model.device
        lengths = torch.tensor(self.lengths, device=device).repeat_interleave(self.copies)[:, None]
        starts = torch.tensor(self.starts, device=device).repeat_interleave(self.copies)[:, None]
        columns = torch.arange(self.width + self.steps + 1, device=device)[None]
        of_reply = columns >= self.width
        keys = torch.where(of_reply, columns - self.width + lengths, columns)  # places of keys, in each row's own count
        places = lengths + self.steps
        states = self.model.read(
            torch.tensor([tokens], device=device), token_type_ids=torch.full((1, len(tokens)), kind, device=device),
            position_ids=(places + starts).T, use_cache=True, past_key_values=self,
            attention_mask=self._mask((of_reply | (columns < lengths))[:, None, None], places, keys),
        ).last_hidden_state
        self.steps += 1
        return self._vocabulary_logits(states[0])

    def keep(self, contexts: list[int]) -> None:
        """Go on with these contexts alone, and their replies, in this order; each is below or where it was."""
        for states, rows in ((self.of_contexts, 1), (self.of_replies, self.copies)):
            for layer, pair in states.items():
                for tensor in pair:
                    for new, old in enumerate(contexts):
                        if new != old:
                            tensor[new * rows:(new + 1) * rows] = tensor[old * rows:(old + 1) * rows].clone()
                states[layer] = tuple(tensor[:len(contexts) * rows] for tensor in pair)
        self.starts = [self.starts[context] for context in contexts]
        self.lengths = [self.lengths[context] for context in contexts]

    def follow(self, parents: list[int]) -> None:
        """Let each row go on from what the row ``parents[row]`` of the same context has said."""
        if parents == list(range(len(parents))):
            return
        rows = torch.tensor(parents, device=self.model.device)
        for pair in self.of_replies.values():
            for tensor in pair:
                tensor[:, :, :self.steps] = tensor[rows, :, :self.steps]

    def _mask(self, seen: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | dict:
        masks = self.model.layer_masks(seen, queries, keys)
        if isinstance(masks, dict):
            return {kind: _additive(mask) for kind, mask in masks.items()}
        return _additive(masks)

    def _vocabulary_logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.model.vocabulary_logits(states)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_, **__) -> tuple:
        """Take in the keys and values of a pass, (1, heads, tokens, size) each; attention calls it.

        What it returns tells `attend` where to look.
        """
        states, rows, width = self.of_replies, len(self.lengths) * self.copies, self.longest
        if self.parts:
            states, rows, width = self.of_contexts, len(self.lengths), self.width
        if layer not in states:
            states[layer] = tuple(one.new_zeros(rows, one.shape[1], width, one.shape[3]) for one in (keys, values))
        for tensor, one in zip(states[layer], (keys, values), strict=True):
            for part in self.parts:
                tensor[part.slot, :, part.shared:part.length] = one[0, :, part.tokens]
                if part.shared:
                    tensor[part.slot, :, :part.shared] = tensor[part.source, :, :part.shared]
            if not self.parts:
                tensor[:, :, self.steps] = one[0].transpose(0, 1)
        keys.sequences, keys.layer = self, layer
        return keys, values

    def get_seq_length(self, *_) -> int:
        """Some families ask, to number positions; they are given ours."""
        return 0

    def attend(self, layer: int, query: torch.Tensor, mask: torch.Tensor, attention: Callable, scaling: float,
               softcap: float | None) -> torch.Tensor:
        """Attention of a pass: ``query`` (1, heads, tokens, size) → (1, tokens, heads, size).

        ``attention`` computes that of a context, in the interface of transformers.
        """
        keys, values = self.of_contexts[layer]
        if self.parts:
            out = [attention(query[:, :, part.tokens], keys[part.slot, None, :, :part.length],
                             values[part.slot, None, :, :part.length], mask[..., part.tokens, :part.length])
                   for part in self.parts]
            return torch.cat(out, 1)
        contexts, heads, size = len(self.lengths), keys.shape[1], keys.shape[3]
        said_keys, said_values = (tensor[:, :, :self.steps + 1] for tensor in self.of_replies[layer])
        query = query[0].transpose(0, 1) * scaling  # (rows, query heads, size)
        query = query.reshape(len(query), heads, -1, size)  # query heads by the key head that they share

        def by_context(rows: torch.Tensor) -> torch.Tensor:
            """(rows, heads, queries, …) → (contexts, heads, copies · queries, …)"""
            return rows.unflatten(0, (contexts, self.copies)).transpose(1, 2).flatten(2, 3)

        def by_row(grouped: torch.Tensor) -> torch.Tensor:
            return grouped.unflatten(2, (self.copies, -1)).transpose(1, 2).flatten(0, 1)

        scores = torch.cat([by_row(by_context(query) @ keys.transpose(2, 3)), query @ said_keys.transpose(2, 3)], -1)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = (scores + mask).softmax(-1).to(values.dtype)  # the sum and the softmax in float32
        out = by_row(by_context(weights[..., :self.width]) @ values) + weights[..., self.width:] @ said_values
        return out.flatten(1, 2)[None]


def _additive(mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)


def attend(attention: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
           attention_mask: torch.Tensor | None, scaling: float | None = None, softcap: float | None = None,
           **how) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention in the interface of transformers: that of `Sequences` in its passes, ``attention`` otherwise."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    usual = ALL_ATTENTION_FUNCTIONS.get_interface(attention, eager)
    options = how | {name: value for name, value in (("scaling", scaling), ("softcap", softcap)) if value is not None}
    sequences = getattr(key, "sequences", None)
    if sequences is None:
        return usual(module, query, key, value, attention_mask, **options)

    def of_context(query, key, value, mask) -> torch.Tensor:
        return usual(module, query, key, value, mask.to(query.dtype), **options)[0]

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return sequences.attend(key.layer, query, attention_mask, of_context, scale, softcap).to(query.dtype), None


def extend_attention_(model: DoubleHeadsModel) -> bool:
    """Make `attend` the model's attention, in place. False where the family's code has an attention of its own."""
    attention = model.config._attn_implementation
    if attention.endswith(IN_STEP):
        return True
    family = next(known for known in type(model).__mro__ if known.__module__.startswith("transformers."))
    if not family._can_set_attn_implementation():
        return False
    AttentionInterface.register(attention + IN_STEP, partial(attend, attention))
    AttentionMaskInterface.register(attention + IN_STEP, ALL_MASK_ATTENTION_FUNCTIONS[attention])
    model.set_attn_implementation(attention + IN_STEP)
    return True


class PaddedSequences:
    """What `Sequences` does, with the cache of transformers: rows padded on the left. For all other families."""

    def __init__(self, model: DoubleHeadsModel, contexts: Sequence[Segment], copies: int, longest: int):
        self.model, self.copies, self.steps, self.cache = model, copies, 0, DynamicCache()
        width, device = max(len(context.ids) for context in contexts), model.device
        padding = [[0] * (width - len(context.ids)) for context in contexts]
        self.seen = torch.tensor([[*pad, *[1] * len(context.ids)]
                                  for pad, context in zip(padding, contexts, strict=True)], device=device)
        starts = torch.tensor([[context.start] for context in contexts], device=device)
        positions = (starts + self.seen.cumsum(-1) - 1).clamp(min=0)
        self.logits = model(
            torch.tensor([pad + context.ids for pad, context in zip(padding, contexts, strict=True)], device=device),
            token_type_ids=torch.tensor([[contexts[0].types[0]] * len(pad) + context.types
                                         for pad, context in zip(padding, contexts, strict=True)], device=device),
            attention_mask=self.seen, position_ids=positions, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1).logits[:, -1]
        self.position = positions[:, -1:].repeat_interleave(copies, 0)
        self.seen = self.seen.repeat_interleave(copies, 0)
        self.cache.batch_repeat_interleave(copies)

    def step(self, tokens: Sequence[int], kind: int) -> torch.Tensor:
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        self.position = self.position + 1
        self.seen = F.pad(self.seen, (0, 1), value=1)
        return self.model(ids, token_type_ids=torch.full_like(ids, kind), attention_mask=self.seen,
                          position_ids=self.position, past_key_values=self.cache, use_cache=True).logits[:, -1]

    def keep(self, contexts: list[int]) -> None:
        rows = [context * self.copies + copy for context in contexts for copy in range(self.copies)]
        self.follow(rows)
        self.position, self.seen = self.position[rows], self.seen[rows]

    def follow(self, parents: list[int]) -> None:
        self.cache.reorder_cache(torch.tensor(parents, device=self.model.device))


def sequences_for(model: DoubleHeadsModel, contexts: Sequence[Segment], copies: int, longest: int):
    """`Sequences`, or `PaddedSequences` for families whose attention cannot be replaced."""
    kind = Sequences if extend_attention_(model) else PaddedSequences
    return kind(model, contexts, copies, longest)
