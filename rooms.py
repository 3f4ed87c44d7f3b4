"""Keep keys and values at fixed places in the memory of a GPU, and extend many sequences in one recorded pass.

`sequences.StaticSequences` decodes a batch in a room, and on GPUs each shelf of `web.keyvalues` is one. This file knows
token ids, keys and values, but neither requests nor how a token is chosen.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphs import Recorded
from inputs import rounded
from llama import llama_body
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
        self.recorded, self.llama = Recorded(), llama_body(model)

    def extend(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Compute the tokens of ``pieces``; return the logits after the last token of each, (pieces, vocabulary).

        The last token of each piece, and the last piece, are repeated until the numbers of tokens and pieces are round.
        This stores the same keys and values at the same places once more.
        """
        count, tokens = len(pieces), max(len(piece.ids) for piece in pieces)
        if tokens > 1:
            tokens = rounded(tokens, 16, 4)
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
        if self.model.device.type != "cuda":
            return self._pass(batch, whole)[:count]
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):  # cuDNN prepares each new shape for long
            return self.recorded(self._pass, batch, whole)[:count]

    def _pass(self, batch: dict[str, torch.Tensor], whole: bool) -> torch.Tensor:
        """Compute ``batch``: ids, types and columns of tokens (3, pieces, tokens), slots and starts (2, pieces).

        ``whole``: whether the pieces belong to all rows of the room, in order. Returns logits, (pieces, vocabulary).
        """
        ids, types, self.new_columns = batch["tokens"]
        self.slots, self.whole, starts = batch["sequences"][0], whole, batch["sequences"][1][:, None]
        positions = starts + self.new_columns
        seen = self.places[None] <= self.new_columns[:, :, None]  # (pieces, tokens, columns)
        masks = self.model.layer_masks(seen[:, None], positions, starts + self.places)
        if self.llama:
            states = self.llama(ids.view(1, -1), types.view(1, -1), positions.view(1, -1), self, masks)
            states = states.view(*ids.shape, -1)
        else:
            states = self.model.encode(ids, token_type_ids=types, position_ids=positions, attention_mask=masks,
                                       past_key_values=self, use_cache=True).last_hidden_state
        return self.model.vocabulary_logits(states[:, -1])

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_, **__) -> tuple:
        """Store the keys and values of a pass, and return those of all columns; the model's layers call this.

        The new ones are (pieces, heads, tokens, size) each, or in a row as for `attend`, which gets the others itself.
        """
        for which, new in enumerate((keys, values)):
            if (layer, which) not in self.states:
                self.states[layer, which] = new.new_zeros(self.rows, new.shape[1], self.columns, new.shape[3])
            new = new[0].transpose(0, 1).unflatten(0, self.new_columns.shape) if self.llama else new.transpose(1, 2)
            self.states[layer, which][self.slots[:, None], :, self.new_columns] = new  # (pieces, tokens, heads, size)
        return (keys, values) if self.llama else self._seen(layer)

    def _seen(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of a pass's sequences, (pieces, heads, columns, size) each."""
        keys, values = self.states[layer, 0], self.states[layer, 1]
        return (keys, values) if self.whole else (keys[self.slots], values[self.slots])

    def attend(self, layer: int, query: torch.Tensor, mask: torch.Tensor, attention: Callable, scaling: float,
               softcap: float | None) -> torch.Tensor:
        """Compute the attention of a pass whose tokens lie in a row: ``query`` (1, heads, pieces · tokens, size).

        ``mask``: (pieces, 1, tokens, columns). The result is (1, pieces · tokens, heads, size). `llama.LlamaBody` calls
        this; ``attention`` and ``softcap`` are not needed. All query heads that share a key head are rows of one
        product with it.
        """
        keys, values = self._seen(layer)
        pieces, tokens = self.new_columns.shape
        grouped = query[0].transpose(0, 1).unflatten(0, (pieces, tokens)).unflatten(2, (keys.shape[1], -1))
        group = grouped.shape[3]
        grouped = grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (pieces, key heads, group · tokens, size)
        if tokens > 1:
            mask = mask.repeat(1, 1, group, 1)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
        return out.unflatten(2, (group, tokens)).permute(0, 3, 1, 2, 4).reshape(1, pieces * tokens, -1, out.shape[3])

    def get_seq_length(self, *_) -> int:
        """Return 0. Some families use this to number positions, but here positions are given."""
        return 0

    def clear(self) -> None:
        """Set everything to 0, because NaN of earlier sequences would spread even from masked columns."""
        if self.states:
            torch._foreach_zero_(list(self.states.values()))
