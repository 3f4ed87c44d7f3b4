"""A cache of keys and values for many sequences at once, and the attention that reads it.

On CPUs, all new tokens of a step form one row without padding, so that the linear layers, most of the work, get one
matrix. On GPUs, each shelf computes a pass of its own, see `rooms.Room`. Keys and values lie on shelves: a shelf has
room for a few sequences of similar length, and its memory is freed when the last of them is released, or on GPUs when
it is needed. This file knows neither requests nor texts.
"""

import mmap
import time
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import NamedTuple

import torch
from torch import nn

from cli import InputError
from drafts import Ahead
from layers import additive, extend_attention_, grouped_attention, usual_attention
from llama import LlamaBody, llama_body
from model import DoubleHeadsModel
from rooms import Piece, Room
from rooms import columns_for as room_columns
from sequences import common_length

BY_ROW = "_by_row"  # suffix of the attention's name
MEMORY = 2048  # MiB of keys and values
LEAST_COLUMNS = 64
TOGETHER = 8  # sequences on one shelf
SHORT = 512  # columns of the longest sequences that share a shelf; each longer sequence has its own
IN_A_ROOM = 32  # sequences on one shelf of a GPU, if 1 / ROOMS of the memory is enough for so many
ROOMS = 8
LONG_PIECE = 256  # more new tokens than this are computed in a pass of their own
LEAST_KNOWN = 16  # tokens that are worth copying
MOST_KNOWN = 1024  # tokens that are kept: copying more would delay all replies
MOST_KEPT = 256  # sequences that are kept: each step looks at all of them
STEP = 256  # the columns of a longer sequence are a multiple of this


def belongs_in_rooms(model: DoubleHeadsModel) -> bool:
    """Return whether each shelf should be a `Room`: on GPUs, where starting work takes longer than doing it."""
    return model.device.type != "cpu"


class Place:
    """The place of one sequence's keys and values. It stays the same object when its contents are moved."""

    def __init__(self, shelf: "Shelf", slot: int):
        self.shelf, self.slot = shelf, slot


class BatchRow:
    """One sequence of the batch, from the first token of its context on."""

    def __init__(self, place: Place, start: int, length: int, ids: list[int], types: list[int],
                 ahead: Ahead | None = None):
        self.place = place
        self.start = start  # position of the first token
        self.length = length  # number of tokens computed
        self.ids, self.types = ids, types  # tokens not computed yet: a context, later single tokens
        self.ahead = ahead  # the whole sequence with its guesses


class Kept(NamedTuple):
    """A sequence that has been computed, kept because another may begin in the same way."""

    owner: tuple[str, str]  # address and key
    start: int  # position of the first token
    tokens: list[tuple[int, int]]  # ids with types
    place: Place  # on a shelf of its own, exactly as long as the tokens
    last_use: float  # s


class Work(NamedTuple):
    """A row, and the number of its ``ids`` that a step computes."""

    row: BatchRow
    tokens: int


class Block(NamedTuple):
    """Sequences on a shelf with the same number of new tokens each, so that one call attends for all."""

    tokens: slice  # places of the new tokens in the row of all new tokens
    shelf: "Shelf"
    slots: slice  # from the first sequence to the last
    width: int  # length of the longest sequence, new tokens included
    own: torch.Tensor | None  # which of ``slots`` these sequences have; None: all of them

    def by_slot(self, new: torch.Tensor) -> torch.Tensor:
        """Divide what belongs to new tokens, (tokens, …), among the slots, (slots, tokens of each, …); fill with 0."""
        if self.own is None:
            return new.unflatten(0, (self.slots.stop - self.slots.start, -1))
        of_sequences = new.unflatten(0, (len(self.own), -1))
        spread = new.new_zeros(self.slots.stop - self.slots.start, *of_sequences.shape[1:])
        return spread.index_copy_(0, self.own, of_sequences)

    def by_token(self, states: torch.Tensor) -> torch.Tensor:
        """Return what belongs to the new tokens, (tokens, …), of states by slot, (slots, tokens of each, …)."""
        return (states if self.own is None else states[self.own]).flatten(0, 1)


class Shelf:
    """Memory for ``slots`` sequences of ``columns`` tokens.

    On a CPU each shelf is a mapping of its own: its pages cost nothing until they are written, and freeing it returns
    them to the system, while the heap would keep them. ``states``: by layer and 0 the keys, (slots, heads, size,
    columns), as their product with queries reads them, but in a room (slots, heads, columns, size); by layer and 1 the
    values, (slots, heads, columns, size).
    """

    def __init__(self, shapes: dict[tuple[int, int], tuple[int, int]], slots: int, columns: int, like: torch.Tensor,
                 in_room: bool):
        self.columns, self.in_room = columns, in_room
        self.room: Room | None = None
        self.places: list[Place | None] = [None] * slots
        sizes = {which: (slots, heads, *((columns, size) if which[1] or in_room else (size, columns)))
                 for which, (heads, size) in shapes.items()}
        numbers = {which: torch.Size(shape).numel() for which, shape in sizes.items()}
        if like.device.type == "cpu":
            memory = torch.frombuffer(mmap.mmap(-1, like.element_size() * sum(numbers.values())), dtype=like.dtype)
        else:
            memory = like.new_zeros(sum(numbers.values()))
        parts = memory.split(list(numbers.values()))
        self.states = {which: part.view(shape) for (which, shape), part in zip(sizes.items(), parts, strict=True)}

    @property
    def taken(self) -> int:
        return sum(place is not None for place in self.places)

    def part(self, which: tuple[int, int], slot: int, columns: slice) -> torch.Tensor:
        """Return the keys or values of some columns of one sequence."""
        states = self.states[which][slot]
        return states[:, columns] if which[1] or self.in_room else states[:, :, columns]


class KeyValues:
    """Keys and values of all sequences. This replaces transformers' caches, which pad all rows to one length.

    ``shapes``: (heads, size) by layer and 0 for keys, 1 for values; `of` asks the model for them. ``memory``: bytes
    that the caller allows. On GPUs it limits the sequences per shelf, and what empty shelves may hold. ``in_rooms``:
    whether each shelf is a `Room`.
    """

    def __init__(self, shapes: dict[tuple[int, int], tuple[int, int]], like: torch.Tensor, memory: int, in_rooms: bool):
        self.shapes, self.like, self.memory, self.in_rooms = shapes, like, memory, in_rooms
        self.llama: LlamaBody | None = None
        self.shelves: list[Shelf] = []
        self.kept: list[Kept] = []  # the last used comes last
        self.blocks: list[Block] = []
        self.masks: list[tuple[torch.Tensor, list[torch.Tensor]]] = []  # what `masks_of` returned for this step
        self.passes = 0  # forward passes so far
        self.token_bytes = like.element_size() * sum(heads * size for heads, size in shapes.values())

    @classmethod
    @torch.inference_mode()
    def of(cls, model: DoubleHeadsModel, memory: int = MEMORY << 20) -> "KeyValues":
        """Create an empty cache for a model, whose shapes of keys and values a pass over one token shows."""
        shapes: dict[tuple[int, int], tuple[int, int]] = {}
        like = []

        class ShapeRecorder:
            def update(self, keys, values, layer, *_):
                for which, new in enumerate((keys, values)):
                    shapes[layer, which] = new.shape[1], new.shape[3]
                like.append(keys[:0])
                return keys, values

            def get_seq_length(self, *_):
                return 0

        one = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        seen = model.layer_masks(torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device), one, one)
        model.encode(one, token_type_ids=one, position_ids=one, attention_mask=seen, past_key_values=ShapeRecorder(),
                     use_cache=True)
        cache = cls(shapes, like[0], memory, belongs_in_rooms(model))
        cache.llama = llama_body(model)
        return cache

    # --------------------------------------------------------------------------------------------------- room

    def columns_for(self, tokens: int) -> int:
        """Return the columns to allocate for a sequence of at most ``tokens`` tokens."""
        if self.in_rooms:
            return room_columns(tokens)
        if tokens <= SHORT:
            return room_columns(tokens, LEAST_COLUMNS)
        return -(-tokens // STEP) * STEP

    def slots_for(self, columns: int) -> int:
        """Return the number of sequences that share a shelf with so many columns."""
        if self.in_rooms:
            most = self.memory // ROOMS // (columns * self.token_bytes)
            return min(IN_A_ROOM, 1 << most.bit_length() - 1) if most else 1
        return TOGETHER if columns <= SHORT else 1

    def bytes_for(self, tokens: int, rows: int) -> int:
        """Return the bytes to allocate in an empty cache for ``rows`` sequences of at most ``tokens`` tokens."""
        columns = self.columns_for(tokens)
        slots = self.slots_for(columns)
        return -(-rows // slots) * slots * columns * self.token_bytes

    @property
    def bytes(self) -> int:
        """Number of bytes of the shelves that are not empty."""
        return self._bytes_of(shelf for shelf in self.shelves if shelf.taken)

    def _bytes_of(self, shelves: Iterable[Shelf]) -> int:
        return sum(len(shelf.places) * shelf.columns for shelf in shelves) * self.token_bytes

    def bytes_with(self, tokens: int, rows: int) -> int:
        """Return the `bytes` with ``rows`` more sequences of at most ``tokens`` tokens."""
        columns = self.columns_for(tokens)
        free = sum(len(shelf.places) - shelf.taken for shelf in self.shelves
                   if shelf.taken and shelf.columns == columns)
        return self.bytes + self.bytes_for(tokens, max(rows - free, 0))

    def _make_room(self, needed: int) -> None:
        """Drop the empty shelves if so many bytes are not free beside them."""
        if self._bytes_of(self.shelves) + self.kept_bytes + needed > self.memory:
            self.shelves = [shelf for shelf in self.shelves if shelf.taken]

    def allocate(self, tokens: int, rows: int) -> list[Place]:
        """Return places for ``rows`` sequences of at most ``tokens`` tokens."""
        columns = self.columns_for(tokens)
        places = []
        while len(places) < rows:
            free = [shelf for shelf in self.shelves if shelf.columns == columns and None in shelf.places]
            if free:
                shelf = max(free, key=lambda shelf: shelf.taken > 0)  # the first that is not empty
            else:
                slots = self.slots_for(columns)
                self._make_room(slots * columns * self.token_bytes)
                self.shelves.append(shelf := Shelf(self.shapes, slots, columns, self.like, self.in_rooms))
            place = Place(shelf, shelf.places.index(None))
            shelf.places[place.slot] = place
            places.append(place)
        return places

    def release(self, places: Iterable[Place], clear: bool = False) -> None:
        """Free places. ``clear``: set them to zero, as NaN would spread even from masked columns."""
        for place in places:
            if clear:
                for states in place.shelf.states.values():
                    states[place.slot] = 0
            place.shelf.places[place.slot] = None
        if not self.in_rooms:  # a room keeps its recorded passes as long as it can
            self.shelves = [shelf for shelf in self.shelves if shelf.taken]

    def compact(self) -> None:
        """Move one sequence if this helps to empty a shelf. Only one per call, so that replies are not delayed."""
        for columns in {shelf.columns for shelf in self.shelves if shelf.taken and len(shelf.places) > 1}:
            shelves = sorted((shelf for shelf in self.shelves if shelf.columns == columns and shelf.taken),
                             key=lambda one: one.taken)
            if sum(shelf.taken for shelf in shelves) <= (len(shelves) - 1) * self.slots_for(columns):
                place = next(place for place in shelves[0].places if place)
                goal = next(shelf for shelf in reversed(shelves) if None in shelf.places)
                free = Place(goal, goal.places.index(None))
                self.copy(place, free, slice(None))
                self.release([place])
                goal.places[free.slot], place.shelf, place.slot = place, free.shelf, free.slot
                return

    def copy(self, source: Place, target: Place, columns: slice) -> None:
        parts = [[place.shelf.part(which, place.slot, columns) for which in self.shapes] for place in (target, source)]
        torch._foreach_copy_(*parts)

    # ------------------------------------------------------------------------------------ what later ones begin with

    @property
    def kept_bytes(self) -> int:
        """Number of bytes of the sequences in `kept`, which come on top of `bytes`."""
        return sum(len(one.tokens) for one in self.kept) * self.token_bytes

    def keep(self, owner: tuple[str, str], start: int, tokens: list[tuple[int, int]], place: Place, most: int) -> None:
        """Keep a copy of the first columns of ``place``, those of ``tokens``, while `kept` has at most ``most`` bytes.

        It replaces those of the same owner that it begins with. More than `MOST_KNOWN` tokens are not kept.
        """
        if len(tokens) > MOST_KNOWN or len(tokens) * self.token_bytes > most:
            return
        self.kept = [one for one in self.kept if one.owner != owner or one.tokens != tokens[:len(one.tokens)]]
        self.shrink(most - len(tokens) * self.token_bytes)
        self._make_room(len(tokens) * self.token_bytes)
        copy = Place(Shelf(self.shapes, 1, len(tokens), self.like, self.in_rooms), 0)
        self.copy(place, copy, slice(0, len(tokens)))
        self.kept.append(Kept(owner, start, tokens, copy, time.monotonic()))

    def recall(self, owner: tuple[str, str], start: int, tokens: list[tuple[int, int]], places: Iterable[Place]) -> int:
        """Copy what the owner's kept sequences have of ``tokens`` into ``places``; return the number of tokens."""
        mine = [(common_length(one.tokens, tokens), one) for one in self.kept
                if (one.owner, one.start) == (owner, start)]
        known, best = max(mine, key=lambda one: one[0], default=(0, None))
        if best is None or known < LEAST_KNOWN:
            return 0
        for place in places:
            self.copy(best.place, place, slice(0, known))
        self.kept = [one for one in self.kept if one is not best] + [best._replace(last_use=time.monotonic())]
        return known

    def shrink(self, most: int, oldest: float = 0) -> None:
        """Drop kept sequences last used before ``oldest``, then more until `MOST_KEPT` with ``most`` bytes remain.

        The address with the most sequences loses first, and of these the one that was not used for the longest time.
        """
        if self.kept and self.kept[0].last_use < oldest:
            self.kept = [one for one in self.kept if one.last_use >= oldest]
        while len(self.kept) > MOST_KEPT or self.kept_bytes > most:
            counts = Counter(one.owner[0] for one in self.kept)
            dropped = max(self.kept, key=lambda one: counts[one.owner[0]])  # the first of several is the oldest
            self.kept = [one for one in self.kept if one is not dropped]

    # ------------------------------------------------------------------------------------------ a forward pass

    def compute(self, model: DoubleHeadsModel, work: list[Work]) -> tuple[list[BatchRow], torch.Tensor]:
        """Compute the next tokens of each row.

        Returns the rows whose tokens are all computed, in any order, and the logits after their last tokens, (rows,
        vocabulary). An error changes nothing except the columns that were to be written. On a CPU, a single token of a
        single row is computed together with guesses, or was one of them.
        """
        work = self._in_order(work)
        ready = [number for number, (row, new) in enumerate(work) if new == len(row.ids)]
        if self.in_rooms:
            self.passes += 1
            logits = self._in_rooms(model, work)[ready]
        elif len(work) == 1 and work[0].tokens == len(work[0].row.ids) == 1 and (ahead := work[0].row.ahead):
            logits = ahead.step(lambda ids: self._extend(model, work[0].row, ids))
        else:
            self.passes += 1
            states = self._states(model, work)
            last = torch.tensor([new for _, new in work], device=model.device).cumsum(0) - 1
            logits = model.vocabulary_logits(states[0, last[ready]])
            for row, _ in work:
                if row.ahead:
                    row.ahead.computed = []  # in columns that have been overwritten
        for row, new in work:
            row.length += new
            row.ids, row.types = row.ids[new:], row.types[new:]
        return [work[number].row for number in ready], logits

    def _in_rooms(self, model: DoubleHeadsModel, work: list[Work]) -> torch.Tensor:
        """Compute the next tokens of rows in order and return the logits after the last of each, (rows, vocabulary).

        Each shelf needs a pass for its single tokens, one for its pieces of contexts, and one for each long piece.
        """
        def with_others(one: Work) -> tuple:
            return id(one.row.place.shelf), one.tokens == 1, id(one) if one.tokens > LONG_PIECE else None

        logits = []
        for _, group in groupby(work, with_others):
            together = list(group)
            shelf = together[0].row.place.shelf
            shelf.room = shelf.room or Room(model, len(shelf.places), shelf.columns, shelf.states)
            logits.append(shelf.room.extend([Piece(row.place.slot, row.start, row.length, row.ids[:new],
                                                   row.types[:new]) for row, new in together]))
        return torch.cat(logits)

    def _extend(self, model: DoubleHeadsModel, row: BatchRow, ids: list[int]) -> torch.Tensor:
        """Compute the next tokens of the only row and return the logits after each, (tokens, vocabulary)."""
        states, slot = row.place.shelf.states, row.place.slot
        self.passes += 1
        if self.llama and self.llama.can_extend:  # in fewer operations
            cache = {layer: (states[layer, 0][slot:slot + 1], states[layer, 1][slot:slot + 1])
                     for layer, which in states if not which}
            hidden = self.llama.extend(ids, row.types[0], row.start + row.length, cache, row.length)
        else:
            guessed = BatchRow(row.place, row.start, row.length, ids, row.types * len(ids))
            hidden = self._states(model, [Work(guessed, len(ids))])
        return model.vocabulary_logits(hidden[0])

    def _in_order(self, work: list[Work]) -> list[Work]:
        """Sort rows by their shelves, numbers of tokens and places, so that they can share blocks."""
        order = {id(shelf): number for number, shelf in enumerate(self.shelves)}
        return sorted(work, key=lambda one: (order[id(one.row.place.shelf)], one.tokens, one.row.place.slot))

    def _blocks(self, work: list[Work], device: torch.device) -> list[Block]:
        """Divide rows in order into blocks: all rows of a shelf with one token, and neighbours with the same number.

        A block computes, and throws away, what lies between its rows; for single tokens this takes less time than
        another block.
        """
        groups: list[list[Work]] = []
        for one in work:
            if groups:
                last = groups[-1][-1]
                near = one.tokens == 1 or one.row.place.slot == last.row.place.slot + 1
                if near and (last.row.place.shelf, last.tokens) == (one.row.place.shelf, one.tokens):
                    groups[-1].append(one)
                    continue
            groups.append([one])
        blocks, done = [], 0
        for group in groups:
            slots = [row.place.slot for row, _ in group]
            extent, tokens = slice(slots[0], slots[-1] + 1), group[0].tokens * len(group)
            own = None if extent.stop - extent.start == len(group) else torch.tensor(
                [slot - extent.start for slot in slots], device=device)
            blocks.append(Block(slice(done, done + tokens), group[0].row.place.shelf, extent,
                                max(row.length + new for row, new in group), own))
            done += tokens
        return blocks

    def _states(self, model: DoubleHeadsModel, work: list[Work]) -> torch.Tensor:
        """Compute the last hidden states of the next tokens of rows in order, (1, tokens, hidden)."""
        self.blocks, self.masks = self._blocks(work, model.device), []
        width = max(block.width for block in self.blocks)

        def flat(values: Iterable[Iterable[int]]) -> torch.Tensor:
            return torch.tensor([one for some in values for one in some], device=model.device)

        self.columns = flat(range(row.length, row.length + new) for row, new in work)
        self.slots = flat([row.place.slot] * new for row, new in work)
        seen = torch.arange(width, device=model.device)
        ids, types = (flat(values)[None] for values in ((row.ids[:new] for row, new in work),
                                                        (row.types[:new] for row, new in work)))
        positions = (self.columns + flat([row.start] * new for row, new in work))[None]
        masks = model.layer_masks((seen <= self.columns[:, None])[None, None], self.columns[None], seen[None])
        if self.llama:
            by_kind = {kind: self.masks_of(mask) for kind, mask in masks.items()} if isinstance(
                masks, dict) else self.masks_of(masks)
            return self.llama(ids, types, positions, self, by_kind)
        return model.encode(ids, token_type_ids=types, position_ids=positions, attention_mask=masks,
                            past_key_values=self, use_cache=True).last_hidden_state

    def masks_of(self, mask: torch.Tensor) -> list[torch.Tensor]:
        """Return each block's part of a mask, (slots, 1, tokens of each, width), as numbers to add.

        Layers that share a mask share the result.
        """
        known = next((masks for one, masks in self.masks if one is mask), None)
        if known is None:
            numbers = additive(mask[0, 0], torch.float32) if mask.dtype == torch.bool else mask[0, 0].float()
            known = [block.by_slot(numbers[block.tokens, :block.width])[:, None] for block in self.blocks]
            self.masks.append((mask, known))
        return known

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the keys and values of the new tokens, (1, heads, tokens, size) each; the model's layers call this.

        The returned keys carry references to this object and the layer, for `attend_by_row`.
        """
        for shelf, group in groupby(self.blocks, lambda block: block.shelf):
            blocks = list(group)
            tokens = slice(blocks[0].tokens.start, blocks[-1].tokens.stop)
            slots, columns = self.slots[tokens], self.columns[tokens]
            shelf.states[layer, 0][slots, :, :, columns] = keys[0, :, tokens].transpose(0, 1)
            shelf.states[layer, 1][slots, :, columns] = values[0, :, tokens].transpose(0, 1)
        # Attributes, because not all families hand further arguments to the attention.
        keys.cache, keys.layer = self, layer
        return keys, values

    def get_seq_length(self, *_) -> int:
        """Return 0: some families call this to number positions, but get the positions from `compute`."""
        return 0

    def attend(self, layer: int, query: torch.Tensor, masks: list[torch.Tensor], attention: Callable, scaling: float,
               softcap: float | None = None) -> torch.Tensor:
        """Compute the attention of the new tokens: ``query`` (1, heads, tokens, size) → (1, tokens, heads, size).

        ``masks``: from `masks_of`. ``attention``, for long contexts of one sequence, is not needed here.
        """
        def products(states, keys, values, mask) -> torch.Tensor:
            return grouped_attention(states, keys, values, mask, scaling, softcap).transpose(1, 2)

        return self.attend_with(products, layer, query, masks)

    def attend_with(self, attention: Callable, layer: int, query: torch.Tensor, masks: list[torch.Tensor]
                    ) -> torch.Tensor:
        """Do the same with another function of query, keys, values and mask of a block.

        It takes these as `grouped_attention` does and returns (slots, tokens, heads, size).
        """
        attended, by_token = [], query[0].transpose(0, 1)
        for block, mask in zip(self.blocks, masks, strict=True):
            keys, values = (block.shelf.states[layer, which][block.slots] for which in (0, 1))
            states = block.by_slot(by_token[block.tokens]).transpose(1, 2)
            own = attention(states, keys[..., :block.width], values[:, :, :block.width], mask)
            attended.append(block.by_token(own))
        return torch.cat(attended)[None].to(query.dtype)


def attend_by_row(attention: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  attention_mask: torch.Tensor, **how) -> tuple[torch.Tensor, None]:
    """Compute the attention of the new tokens of many sequences, in the interface of transformers.

    ``query`` (1, heads, tokens, size); ``key`` as `KeyValues.update` returns it; ``attention_mask`` (1, 1, tokens,
    columns), of each token over its own sequence. ``attention``: name of the implementation that computes
    everything in a forward pass without `KeyValues`, and each block if it does more than SDPA.
    """
    attend = usual_attention(attention, module)
    if not (cache := getattr(key, "cache", None)):
        return attend(module, query, key, value, attention_mask, **how)
    masks, scaling = cache.masks_of(attention_mask), how.get("scaling")
    if "sdpa" in attention and not any(how.get(name) is not None for name in ("s_aux", "position_bias")):
        return cache.attend(key.layer, query, masks, attend, query.shape[-1] ** -0.5 if scaling is None else scaling,
                            how.get("softcap")), None

    def own(states, keys, values, mask) -> torch.Tensor:
        return attend(module, states, keys.transpose(2, 3), values, mask.to(states.dtype), **how)[0]

    return cache.attend_with(own, key.layer, query, masks), None


def let_attend_by_row_(model: DoubleHeadsModel) -> None:
    """Make `attend_by_row` the model's attention, in place. Raises `InputError` if the family's code cannot use it."""
    if not extend_attention_(model, BY_ROW, attend_by_row):
        raise InputError(f"--model_checkpoint: the attention of transformers' '{model.config.model_type}' cannot be "
                         "replaced, so it cannot answer many conversations at once; talk to it with interact.py")
