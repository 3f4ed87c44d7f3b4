"""Keep keys and values at fixed places in the memory of a GPU, and extend many sequences in one recorded pass.

`sequences.StaticSequences` decodes a batch in a room, and on GPUs each shelf of `web.keyvalues` is one. This file knows
token ids, keys and values, but neither requests nor how a token is chosen.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from graphs import Recorded
from model import DoubleHeadsModel

LEAST_COLUMNS = 128
States = dict[tuple[int, int], torch.Tensor]  # by layer and 0 the keys, 1 the values: (rows, heads, columns, size)


class Piece(NamedTuple):
    """The next tokens of a sequence."""

    slot: int  # the row of the room that the sequence has
    start: int  # position of its first token
    length: int  # number of tokens computed before
    ids: Sequence[int]
    types: Sequence[int]


def rounded(tokens: int) -> int:
    """Round the number of a pass's tokens up, so that few numbers remain; from 32 on, it grows by less than a half."""
    if tokens == 1:
        return 1
    step = max(16, (1 << (tokens - 1).bit_length()) // 4)
    return -(-tokens // step) * step


def columns_for(tokens: int, least: int = LEAST_COLUMNS) -> int:
    """Return the columns to allocate for sequences of at most ``tokens`` tokens: a power of two, ``least`` or more."""
    return max(least, 1 << (tokens - 1).bit_length())


class Room:
    """Keys and values of ``rows`` sequences of at most ``columns`` tokens, and the pass that extends some of them.

    Token n of a sequence is in column n of its row. On a GPU a pass is recorded as a CUDA graph for each number of rows
    and tokens. A graph knows the places in memory, so a room is kept for later sequences. ``states``: the memory, if
    there is some already; else the first pass allocates it.
    """

    # What `update` needs to know of the current pass, see `_pass`:
    slots: torch.Tensor
    new_columns: torch.Tensor
    whole: bool

    def __init__(self, model: DoubleHeadsModel, rows: int, columns: int, states: States | None = None):
        self.model, self.rows, self.columns = model, rows, columns
        self.states: States = {} if states is None else states
        self.places = torch.arange(columns, device=model.device)[None]
        self.recorded = Recorded()

    def extend(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Compute the tokens of ``pieces``; return the logits after the last token of each, (pieces, vocabulary).

        The last token of each piece, and the last piece, are repeated until the numbers of tokens and pieces are round.
        This stores the same keys and values at the same places once more.
        """
        count, tokens = len(pieces), rounded(max(len(piece.ids) for piece in pieces))
        pieces = [*pieces, *[pieces[-1]] * (min(1 << (count - 1).bit_length(), self.rows) - count)]

        def filled(values: Iterable[int]) -> list[int]:
            values = list(values)
            return values + values[-1:] * (tokens - len(values))

        batch = {
            "tokens": torch.tensor([[filled(piece.ids) for piece in pieces], [filled(piece.types) for piece in pieces],
                                    [filled(range(piece.length, piece.length + len(piece.ids))) for piece in pieces]],
                                   device=self.model.device),
            "sequences": torch.tensor([[piece.slot for piece in pieces], [piece.start for piece in pieces]],
                                      device=self.model.device)}
        whole = [piece.slot for piece in pieces] == list(range(self.rows))
        if self.model.device.type == "cuda":
            return self.recorded(self._pass, batch, whole)[:count]
        return self._pass(batch, whole)[:count]

    def _pass(self, batch: dict[str, torch.Tensor], whole: bool) -> torch.Tensor:
        """Compute ``batch``: ids, types and columns of tokens (3, pieces, tokens), slots and starts (2, pieces).

        ``whole``: whether the pieces belong to all rows of the room, in order. Returns logits, (pieces, vocabulary).
        """
        ids, types, self.new_columns = batch["tokens"]
        self.slots, self.whole, starts = batch["sequences"][0], whole, batch["sequences"][1][:, None]
        positions = starts + self.new_columns
        seen = self.places[None] <= self.new_columns[:, :, None]  # (pieces, tokens, columns)
        states = self.model.encode(
            ids, token_type_ids=types, position_ids=positions, past_key_values=self, use_cache=True,
            attention_mask=self.model.layer_masks(seen[:, None], positions, starts + self.places)).last_hidden_state
        return self.model.vocabulary_logits(states[:, -1])

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_, **__) -> tuple:
        """Store the keys and values of a pass, (pieces, heads, tokens, size) each, and return those of all columns.

        The model's layers call this.
        """
        found = []
        for which, new in enumerate((keys, values)):
            if (layer, which) not in self.states:
                self.states[layer, which] = new.new_zeros(self.rows, new.shape[1], self.columns, new.shape[3])
            states = self.states[layer, which]
            states[self.slots[:, None], :, self.new_columns] = new.transpose(1, 2)
            found.append(states if self.whole else states[self.slots])
        return tuple(found)

    def get_seq_length(self, *_) -> int:
        """Return 0. Some families use this to number positions, but here positions are given."""
        return 0

    def clear(self) -> None:
        """Set everything to 0, because NaN of earlier sequences would spread even from masked columns."""
        if self.states:
            torch._foreach_zero_(list(self.states.values()))
