"""Compute the forward passes of decoding: many contexts at once without padding, then one token per reply and pass.

The classes here manage token ids, keys and values; decoding.py chooses the tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache

from drafts import Ahead
from inputs import Segment
from layers import extend_attention_, grouped_attention, usual_attention
from llama import llama_body
from model import DoubleHeadsModel
from rooms import Piece, Room, columns_for

PASS = 512  # new tokens of contexts in one forward pass: activations stay in the processor's cache
IN_STEP = "_in_step"  # the suffix of the attention's name, see `layers.extend_attention_`


class Part(NamedTuple):
    """One context within a forward pass, which computes several contexts as one row of tokens."""

    slot: int  # the place of its keys and values
    source: int  # the slot of a context that begins with the same tokens
    shared: int  # the number of these tokens; their keys and values are copied from there
    tokens: slice  # the places of its other tokens in the row
    length: int  # the number of tokens of the whole context


def common_length(one: Sequence, other: Sequence) -> int:
    """Return the number of items with which both begin."""
    return next((n for n, (mine, yours) in enumerate(zip(one, other, strict=False)) if mine != yours),
                min(len(one), len(other)))


class Sequences:
    """Contexts with ``copies`` replies each; every reply grows by one token per `step`.

    ``logits`` (contexts, vocabulary) are the predictions after each context. All contexts are computed as one row of
    tokens without padding; tokens that several contexts begin with are computed once. The reply ``copy`` of a context
    has the row number context · copies + copy; all copies share the keys and values of their context.

    Contexts whose replies have ended leave the batch (`keep`) if ``may_leave`` is true.
    """

    may_leave = True

    def __init__(self, model: DoubleHeadsModel, contexts: Sequence[Segment], copies: int, longest: int,
                 earlier: "Sequences | None" = None):
        """Compute the contexts.

        ``longest``: the largest number of tokens that a reply can have. ``earlier``: the same model's sequences of an
        earlier reply; if there was one context then and there is one now, what both begin with is not computed again.
        """
        self.model, self.copies, self.longest = model, copies, longest
        self.starts = [context.start for context in contexts]
        self.lengths = [len(context.ids) for context in contexts]
        self.width, self.steps = max(self.lengths), 0
        self.of_contexts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer → keys, values
        self.of_replies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.parts: list[Part] = []  # the contexts of the current pass; empty in a `step`
        self.llama = llama_body(model)
        self.ahead = Ahead(model.drafts, contexts[0].ids, self.width + longest) if copies * len(contexts) == 1 else None
        # Of a single context, and of its reply if that is single too: what is computed, as ids with types.
        self.tokens = list(zip(contexts[0].ids, contexts[0].types, strict=True)) if len(contexts) == 1 else []
        self.earlier, self.known = earlier, 0
        if earlier and self.starts == earlier.starts:
            self.known = common_length(earlier.tokens, self.tokens[:-1])  # the last token is always computed
        self.logits = self._encode(contexts, share=True)
        if not self.logits.amax(-1).isfinite().all():  # a broken context must not harm others that begin like it
            self.known = 0
            self.logits = self._encode(contexts, share=False)
        self.earlier = None

    def _encode(self, contexts: Sequence[Segment], share: bool) -> torch.Tensor:
        def sequence(slot: int) -> list[tuple[int, int]]:
            return list(zip(contexts[slot].ids, contexts[slot].types, strict=True))

        order = sorted(range(len(contexts)), key=lambda slot: (contexts[slot].start, sequence(slot)))
        logits, tokens, before = [], 0, None
        for place, slot in enumerate(order):
            shared = self.known
            if share and before is not None and contexts[before].start == contexts[slot].start:
                shared = common_length(sequence(before), sequence(slot)[:-1])
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
        """Compute ``parts`` and return the logits after the last token of each."""
        ids = [token for part in self.parts for token in contexts[part.slot].ids[part.shared:]]
        types = [kind for part in self.parts for kind in contexts[part.slot].types[part.shared:]]
        columns = [column for part in self.parts for column in range(part.shared, part.length)]
        starts = [contexts[part.slot].start for part in self.parts for _ in range(part.shared, part.length)]
        device = self.model.device
        places, seen = torch.tensor(columns, device=device)[None], torch.arange(self.width, device=device)[None]
        states = self._states(torch.tensor([ids], device=device), torch.tensor([types], device=device),
                              places + torch.tensor([starts], device=device),
                              self._mask(seen[None, None] <= places[:, None, :, None], places, seen))
        return self.model.vocabulary_logits(states[0, [part.tokens.stop - 1 for part in self.parts]])

    def step(self, tokens: Sequence[int], kind: int) -> torch.Tensor:
        """Add one token of type ``kind`` to each row and return the logits of the next tokens, (rows, vocabulary)."""
        if self.ahead:
            self.ahead.ids.append(tokens[0])
            logits = self.ahead.step(lambda ids: self._extend(ids, kind))
            self.steps += 1
            self.tokens.append((tokens[0], kind))
            return logits
        device = self.model.device
        lengths = torch.tensor(self.lengths, device=device).repeat_interleave(self.copies)[:, None]
        starts = torch.tensor(self.starts, device=device).repeat_interleave(self.copies)[:, None]
        columns = torch.arange(self.width + self.steps + 1, device=device)[None]
        of_reply = columns >= self.width
        keys = torch.where(of_reply, columns - self.width + lengths, columns)  # each key's place in its own sequence
        places = lengths + self.steps
        states = self._states(torch.tensor([tokens], device=device),
                              torch.full((1, len(tokens)), kind, device=device), (places + starts).T,
                              self._mask((of_reply | (columns < lengths))[:, None, None], places, keys))
        self.steps += 1
        return self.model.vocabulary_logits(states[0])

    def _extend(self, ids: list[int], kind: int) -> torch.Tensor:
        """Compute the next tokens of the only row and return the logits after each, (tokens, vocabulary)."""
        device, column = self.model.device, self.width + self.steps
        if self.llama and self.llama.can_extend:
            states = self.llama.extend(ids, kind, self.starts[0] + column, self.of_contexts, column)
        else:
            places = torch.arange(column, column + len(ids), device=device)[None]
            columns = torch.arange(column + len(ids), device=device)[None]
            states = self._states(torch.tensor([ids], device=device), torch.full((1, len(ids)), kind, device=device),
                                  places + self.starts[0],
                                  self._mask(columns[:, None, None] <= places[:, None, :, None], places, columns))
        return self.model.vocabulary_logits(states[0])

    def _states(self, ids: torch.Tensor, types: torch.Tensor, positions: torch.Tensor,
                mask: torch.Tensor | dict) -> torch.Tensor:
        """Compute the last hidden states of a row of tokens, (1, tokens, hidden)."""
        if self.llama:
            return self.llama(ids, types, positions, self, mask)
        return self.model.encode(ids, token_type_ids=types, position_ids=positions, use_cache=True,
                                 past_key_values=self, attention_mask=mask).last_hidden_state

    def keep(self, contexts: list[int]) -> None:
        """Keep only these contexts and their replies, in this order; no context may move to a higher number."""
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
        """Let each row continue the reply of the row ``parents[row]``, which must belong to the same context."""
        if parents == list(range(len(parents))):
            return
        rows = torch.tensor(parents, device=self.model.device)
        for keys, values in self.of_replies.values():
            keys[..., :self.steps] = keys[rows, ..., :self.steps]
            values[:, :, :self.steps] = values[rows, :, :self.steps]

    def _mask(self, seen: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | dict:
        masks = self.model.layer_masks(seen, queries, keys)
        if isinstance(masks, dict):
            return {kind: _additive(mask) for kind, mask in masks.items()}
        return _additive(masks)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_, **__) -> tuple:
        """Store the keys and values of a pass, (1, heads, tokens, size) each; the model's layers call this.

        The returned keys carry references to this object and the layer, for `decoding_attention`.
        """
        new, rows, width = not self.parts and self.copies > 1, len(self.lengths), self.width
        states = self.of_replies if new else self.of_contexts
        if layer not in states:  # keys are stored transposed, as their product with queries reads them
            rows, width = (rows * self.copies, self.longest) if new else (
                rows, width + self.longest if self.copies == 1 else width)
            kind = torch.float32 if self.ahead and self.llama and self.llama.can_extend else keys.dtype
            states[layer] = (keys.new_zeros(rows, keys.shape[1], keys.shape[3], width, dtype=kind),
                             values.new_zeros(rows, values.shape[1], width, values.shape[3], dtype=kind))
            if self.known and self.earlier:
                for mine, old, columns in zip(states[layer], self.earlier.of_contexts[layer], (3, 2), strict=True):
                    mine.narrow(columns, 0, self.known).copy_(old.narrow(columns, 0, self.known))
        all_keys, all_values = states[layer]
        for part in self.parts:
            all_keys[part.slot, :, :, part.shared:part.length] = keys[0, :, part.tokens].transpose(1, 2)
            all_values[part.slot, :, part.shared:part.length] = values[0, :, part.tokens]
            if part.shared:
                all_keys[part.slot, :, :, :part.shared] = all_keys[part.source, :, :, :part.shared]
                all_values[part.slot, :, :part.shared] = all_values[part.source, :, :part.shared]
        if not self.parts and self.ahead:
            column = self.width + self.steps
            all_keys[0, :, :, column:column + keys.shape[2]] = keys[0].transpose(1, 2)
            all_values[0, :, column:column + keys.shape[2]] = values[0]
        elif not self.parts:
            column = self.steps if new else self.width + self.steps
            all_keys[..., column] = keys[0].transpose(0, 1)
            all_values[:, :, column] = values[0].transpose(0, 1)
        keys.sequences, keys.layer = self, layer
        return keys, values

    def get_seq_length(self, *_) -> int:
        """Return 0. Some families use this to number positions, but here positions are given."""
        return 0

    def attend(self, layer: int, query: torch.Tensor, mask: torch.Tensor, attention: Callable, scaling: float,
               softcap: float | None) -> torch.Tensor:
        """Compute the attention of a pass: ``query`` (1, heads, tokens, size) → (1, tokens, heads, size).

        ``attention``: the function for the tokens of one context, with the interface of transformers.
        """
        keys, values = self.of_contexts[layer]
        if self.parts:
            out = [attention(query[:, :, part.tokens],
                             keys[part.slot, None, ..., :part.length].transpose(2, 3).to(query.dtype),
                             values[part.slot, None, :, :part.length].to(query.dtype),
                             mask[..., part.tokens, :part.length]) for part in self.parts]
            return torch.cat(out, 1)
        if self.ahead:
            end = self.width + self.steps + query.shape[2]
            return grouped_attention(query, keys[..., :end], values[:, :, :end], mask, scaling, softcap).transpose(1, 2)
        query = query[0].transpose(0, 1)  # (rows, query heads, size)
        if self.copies == 1:
            end = self.width + self.steps + 1
            return grouped_attention(query[:, :, None], keys[..., :end], values[:, :, :end], mask, scaling,
                                     softcap)[:, :, 0][None]
        contexts, heads, size = len(self.lengths), keys.shape[1], keys.shape[2]
        query = (query * scaling).reshape(len(query), heads, -1, size)  # by the key head that query heads share
        said_keys, said_values = self.of_replies[layer]
        said_keys, said_values = said_keys[..., :self.steps + 1], said_values[:, :, :self.steps + 1]

        def by_context(rows: torch.Tensor) -> torch.Tensor:
            """Reshape (rows, heads, queries, …) to (contexts, heads, copies · queries, …)."""
            return rows.unflatten(0, (contexts, self.copies)).transpose(1, 2).flatten(2, 3)

        def by_row(grouped: torch.Tensor) -> torch.Tensor:
            return grouped.unflatten(2, (self.copies, -1)).transpose(1, 2).flatten(0, 1)

        scores = torch.cat([by_row(by_context(query) @ keys), query @ said_keys], -1)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = (scores + mask).softmax(-1).to(values.dtype)  # mask and softmax are computed in float32
        out = by_row(by_context(weights[..., :self.width]) @ values) + weights[..., self.width:] @ said_values
        return out.flatten(1, 2)[None]


def _additive(mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)


def decoding_attention(attention: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                       attention_mask: torch.Tensor | None, scaling: float | None = None, softcap: float | None = None,
                       **how) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention behind the interface of transformers: `Sequences.attend` in its passes, else ``attention``."""
    usual = usual_attention(attention, module)
    options = how | {name: value for name, value in (("scaling", scaling), ("softcap", softcap)) if value is not None}
    sequences = getattr(key, "sequences", None)
    if sequences is None:
        return usual(module, query, key, value, attention_mask, **options)

    def of_context(query, key, value, mask) -> torch.Tensor:
        return usual(module, query, key, value, mask.to(query.dtype), **options)[0]

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return sequences.attend(key.layer, query, attention_mask, of_context, scale, softcap).to(query.dtype), None


class StaticSequences:
    """The same as `Sequences` for GPUs, which compute padding faster than the CPU starts work for each context.

    ``earlier``: sequences whose `Room` is used again if it is large enough.
    """

    may_leave = False  # because passes over fewer rows would have to be recorded as well

    def __init__(self, model: DoubleHeadsModel, contexts: Sequence[Segment], copies: int, longest: int,
                 earlier: "StaticSequences | None" = None):
        self.model, self.copies, self.steps = model, copies, 0
        self.slots = list(range(len(contexts) * copies))
        columns = max(len(context.ids) for context in contexts) + longest
        if earlier and earlier.room.rows >= len(self.slots) and earlier.room.columns >= columns:
            self.room: Room = earlier.room
            self.room.clear()
        else:
            self.room = Room(model, len(self.slots), columns_for(columns))
        self.logits = self.room.extend([Piece(number * copies, context.start, 0, context.ids, context.types)
                                        for number, context in enumerate(contexts)])
        self.starts = [context.start for context in contexts for _ in range(copies)]
        self.lengths = [len(context.ids) for context in contexts for _ in range(copies)]
        if copies > 1:
            self._copy([slot // copies * copies for slot in self.slots], 0)

    def step(self, tokens: Sequence[int], kind: int) -> torch.Tensor:
        rows = zip(self.slots, self.starts, self.lengths, tokens, strict=True)
        logits = self.room.extend([Piece(slot, start, length + self.steps, [token], [kind])
                                   for slot, start, length, token in rows])
        self.steps += 1
        return logits

    def keep(self, contexts: list[int]) -> None:
        rows = [context * self.copies + copy for context in contexts for copy in range(self.copies)]
        self.slots, self.starts, self.lengths = ([values[row] for row in rows]
                                                 for values in (self.slots, self.starts, self.lengths))

    def follow(self, parents: list[int]) -> None:
        if parents != list(range(len(parents))):
            self._copy([self.slots[parent] for parent in parents], min(self.lengths))

    def _copy(self, sources: list[int], first: int) -> None:
        """Copy the keys and values of each of ``sources``, from column ``first`` on, to the same item of ``slots``."""
        columns = slice(first, max(self.lengths) + self.steps)
        new, old = (torch.tensor(slots, device=self.model.device) for slots in (self.slots, sources))
        for states in self.room.states.values():
            states[new, :, columns] = states[old, :, columns]


class PaddedSequences:
    """The same as `Sequences` for other model families, with the cache of transformers and padding on the left."""

    may_leave = True

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


def sequences_for(model: DoubleHeadsModel, contexts: Sequence[Segment], copies: int, longest: int,
                  earlier: object = None) -> Sequences | StaticSequences | PaddedSequences:
    """Return `Sequences`, on GPUs `StaticSequences`.

    Model families with attention that cannot be replaced get `PaddedSequences`.
    """
    if not extend_attention_(model, IN_STEP, decoding_attention):
        return PaddedSequences(model, contexts, copies, longest)
    if model.device.type != "cpu":
        return StaticSequences(model, contexts, copies, longest,
                               earlier if isinstance(earlier, StaticSequences) else None)
    return Sequences(model, contexts, copies, longest, earlier if isinstance(earlier, Sequences) else None)
