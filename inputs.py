"""Turn dialogs into rows of token ids, roles and positions for the network, and rows into batches.

A turn becomes one row, ``[context | candidate 1 | … | candidate n]``. The candidates share their context: in a causal
model its states do not depend on what follows, so it is stored and computed once. The positions of every candidate
continue those of the context, and a candidate attends to the context and to itself, but not to the other candidates.
This file knows nothing about the network or the training loop.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, chain
from threading import Thread
from typing import NamedTuple, Self

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from cli import require_memory
from tables import Split
from tokenization import SPECIAL_TOKENS, Tokenizer

IGNORED = -100  # the label that losses skip, as everywhere in transformers
NO_CANDIDATE = -1  # padding of `mc_token_ids` for turns with fewer candidates


class Specials(NamedTuple):
    """Ids of the control tokens."""

    bos: int
    eos: int
    speaker1: int  # the bot
    speaker2: int  # the other person
    pad: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Specials":
        """Look up the control tokens of a tokenizer."""
        return cls(*tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS))


class Segment(NamedTuple):
    """A part of a sequence: token ids and, for each token, the id of its speaker."""

    ids: list[int]
    types: list[int]
    start: int = 0  # position of its first token
    opened: bool = False  # whether the last token already is the role of the reply


def build_context(persona: Sequence[Sequence[int]], history: Sequence[Sequence[int]], special: Specials,
                  history_start: int = 0) -> Segment:
    """Build what comes before a reply: ``<bos> persona… <speaker2> user <speaker1> bot … <speaker2> user``.

    Roles are counted back from the reply, which is the bot's. The role of an utterance determines both its
    ``<speakerN>`` token and its token types. (The code of 2019 counted the types from the front, so the two disagreed
    for histories of even length.) The persona has the bot's type.

    ``history_start``: the position at which the history begins, whatever the persona's length ("history first"). The
    persona ends right before it and must fit in there (`fit_context`). 0: the persona begins at position 0.
    """
    ids = [special.bos, *chain.from_iterable(persona)]
    types = [special.speaker1] * len(ids)
    start = history_start - len(ids) if history_start else 0
    for turns_back, utterance in zip(range(len(history), 0, -1), history, strict=True):
        role = special.speaker2 if turns_back % 2 else special.speaker1
        ids += [role, *utterance]
        types += [role] * (1 + len(utterance))
    return Segment(ids, types, start)


def build_reply(reply: Sequence[int], special: Specials, with_eos: bool = True) -> Segment:
    """Build a candidate, ``<speaker1> reply <eos>``, or with ``with_eos=False`` the beginning of one."""
    ids = [special.speaker1, *reply] + [special.eos] * with_eos
    return Segment(ids, [special.speaker1] * len(ids))


def begin_reply(context: Segment, special: Specials, beginning: Sequence[int] = ()) -> Segment:
    """Return what a model reads before it continues a reply: the context, the opening and the reply's beginning."""
    ids, types, *_ = build_reply(beginning, special, with_eos=False)
    return Segment(context.ids + ids[context.opened:], context.types + types[context.opened:], context.start)


def fit_context(persona: list, history: list, budget: int, history_start: int = 0) -> tuple[list, list]:
    """Shorten persona and history until `build_context` needs at most ``budget`` positions.

    First whole utterances are left out, the oldest first, but never the last one; then persona sentences from the end;
    then the beginning of the last utterance. With ``history_start`` the only persona sentences left out are those that
    do not fit before it.
    """
    persona, history = list(persona), list(history)
    before_history = 1 + sum(map(len, persona))
    while history_start and before_history > history_start:
        before_history -= len(persona.pop())
    excess = (history_start or before_history) + sum(1 + len(utterance) for utterance in history) - budget
    left_out = 0
    while excess > 0 and left_out < len(history) - 1:
        excess -= 1 + len(history[left_out])
        left_out += 1
    del history[:left_out]
    while excess > 0 and persona and not history_start:
        excess -= len(persona.pop())
    if excess > 0 and history:
        history[0] = history[0][min(excess, len(history[0])):]
    return persona, history


def build_input_from_segments(persona, history, reply, tokenizer: Tokenizer, lm_labels=False, with_eos=True) -> dict:
    """Build one candidate as one sequence, with the names of 2019.

    ``persona``, ``history``: lists of lists of token ids; ``reply``: a list of token ids. Returns ``input_ids``,
    ``token_type_ids`` and ``lm_labels`` of the same length, and ``mc_token_ids``, the index of the last token. All
    labels are -100, except, with ``lm_labels``, those of the reply and its ``<eos>``; the model shifts them.
    """
    special = Specials.of(tokenizer)
    context, candidate = build_context(persona, history, special), build_reply(reply, special, with_eos)
    target = candidate.ids[1:] if lm_labels else [IGNORED] * (len(candidate.ids) - 1)
    return {
        "input_ids": context.ids + candidate.ids,
        "token_type_ids": context.types + candidate.types,
        "mc_token_ids": len(context.ids) + len(candidate.ids) - 1,
        "lm_labels": [IGNORED] * (len(context.ids) + 1) + target,
    }


class Row(NamedTuple):
    """One packed turn, or several turns of one dialog. All lists except ``mc_token_ids`` have one element per token."""

    input_ids: list[int]
    token_type_ids: list[int]
    position_ids: list[int]
    segment_ids: list[int]  # 0: context, k: candidate k, counted from 1
    labels: list[int]  # the tokens of gold replies, which the tokens before them predict; elsewhere -100
    mc_token_ids: list[list[int]]  # (turns, candidates): index of each candidate's last token
    visible: list[int]  # number of tokens, from the row's start, of the context that this token attends to


def max_reply(max_positions: int, history_start: int) -> int:
    """Return the length of the longest reply that fits beside ``<bos>``, an utterance's role and its control tokens."""
    return max_positions - 3 - max(history_start, 1)


def pack_turn(persona, history, candidates, special: Specials, max_positions: int, history_start: int = 0) -> Row:
    """Pack a turn, with the gold candidate last, into one row whose positions stay below ``max_positions``.

    A turn that is too long loses its oldest context (`fit_context`); a candidate that is too long even without context
    loses its end. Candidates with the same tokens share one segment, so their scores are exactly equal.
    ``history_start``: see `build_context`.

    >>> special = Specials(bos=0, eos=1, speaker1=2, speaker2=3, pad=4)
    >>> row = pack_turn([[10, 11]], [[20]], candidates=[[30], [40, 41]], special=special, max_positions=99)
    >>> row.input_ids  # <bos> persona <speaker2> utterance | <speaker1> distractor <eos> | <speaker1> gold reply <eos>
    [0, 10, 11, 3, 20, 2, 30, 1, 2, 40, 41, 1]
    >>> row.position_ids  # both candidates continue the context
    [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8]
    >>> row.segment_ids
    [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    >>> row.labels[-4:], row.mc_token_ids  # the gold reply is learnt; the last token of each candidate is scored
    ([-100, 40, 41, 1], [[7, 11]])
    """
    candidates = [tuple(reply[:max_reply(max_positions, history_start)]) for reply in candidates]
    budget = max_positions - 2 - max(map(len, candidates))
    context = build_context(*fit_context(persona, history, budget, history_start), special, history_start)
    return pack_candidates(context, candidates, special)


def pack_candidates(context: Segment, candidates: Sequence[Sequence[int]], special: Specials) -> Row:
    """Pack candidates with their ends behind the context, the gold one last. They must fit there."""
    length, start = len(context.ids), context.start + len(context.ids)
    row = Row([*context.ids], [*context.types], list(range(context.start, start)), [0] * length, [IGNORED] * length, [],
              [length] * length)
    candidates = list(map(tuple, candidates))
    last_token = {}  # candidate → where it ends in the row
    for candidate in dict.fromkeys(candidates):
        ids, types, *_ = build_reply(candidate, special)
        row.input_ids.extend(ids)
        row.token_type_ids.extend(types)
        row.position_ids.extend(range(start, start + len(ids)))
        row.segment_ids.extend([len(last_token) + 1] * len(ids))
        row.labels.extend([IGNORED] + ids[1:] if candidate == candidates[-1] else [IGNORED] * len(ids))
        row.visible.extend([length] * len(ids))
        last_token[candidate] = len(row.input_ids) - 1
    row.mc_token_ids.append([last_token[candidate] for candidate in candidates])
    return row


def pack_dialog(persona, history, turns, special: Specials, max_positions: int, history_start: int = 0) -> Row:
    """Pack consecutive turns of one dialog into one row, in which they share the dialog as their context.

    ``history``: the utterances before the last turn's reply. ``turns``: per turn, in order, the length of its own
    history, which is a prefix of ``history``, and its candidates, the gold one last. The gold reply of every turn but
    the last is the next utterance in ``history``.

    Each turn gets the losses that `pack_turn` would give it alone: its gold reply is read at its place in the dialog;
    every other candidate, and the gold reply's ``<eos>``, is a segment that attends to the dialog up to that place. A
    single turn that is too long loses its oldest context; several turns must fit.
    """
    turns = [(length, [tuple(reply[:max_reply(max_positions, history_start)]) for reply in candidates])
             for length, candidates in turns]
    if len(turns) == 1:
        budget = max_positions - 2 - max(map(len, turns[0][1]))
        persona, history = fit_context(persona, history, budget, history_start)
        turns = [(len(history), turns[0][1])]
    before, last = build_context(persona, history, special, history_start), turns[-1][1][-1]
    reply = build_reply(last, special, with_eos=False)
    # Where each utterance begins in the row, the last gold reply included.
    sizes = [1 + len(utterance) for utterance in history]
    offsets = list(accumulate(sizes, initial=len(before.ids) - sum(sizes)))
    length = len(before.ids) + len(reply.ids)
    row = Row(before.ids + reply.ids, before.types + reply.types, list(range(before.start, before.start + length)),
              [0] * length, [IGNORED] * length, [], [length] * length)
    gold_ends = []
    for history_length, candidates in turns:
        reply_start = offsets[history_length] + 1  # behind <speaker1>
        gold, end, last_token = candidates[-1], reply_start + len(candidates[-1]), {}
        row.labels[reply_start:end] = gold
        gold_ends.append(end)
        for candidate in dict.fromkeys([gold, *candidates]):
            sees, ids = (end, [special.eos]) if candidate == gold else (reply_start, [*candidate, special.eos])
            row.input_ids.extend(ids)
            row.token_type_ids.extend([special.speaker1] * len(ids))
            row.position_ids.extend(range(before.start + sees, before.start + sees + len(ids)))
            row.segment_ids.extend([row.segment_ids[-1] + 1] * len(ids))
            row.labels.extend([IGNORED] * len(ids))
            row.visible.extend([sees] * len(ids))
            last_token[candidate] = len(row.input_ids) - 1
        row.mc_token_ids.append([last_token[candidate] for candidate in candidates])
    for end in gold_ends:  # the gold reply's last token predicts <eos>, whatever follows it in the row
        row.labels[end] = special.eos
    return row


GOLD_MULTIPLE = 256  # gold tokens of a batch on a GPU; 64 turns have about 800
PARTS = 32  # for `rounded`: a sixteenth of a long row on a GPU is added at most


def rounded(number: int, least: int, parts: int) -> int:
    """Round up to a multiple of ``least``, or of the next power of two / ``parts`` if that is larger.

    Few numbers remain, and a large one grows by 2 / ``parts`` of itself at most.
    """
    step = max(least, (1 << (number - 1).bit_length()) // parts)
    return -(-number // step) * step


def find_gold_places(labels: torch.Tensor) -> torch.Tensor:
    """Return the indices of the tokens that predict gold tokens, (gold tokens,), into the flattened ``labels``.

    ``labels`` is (rows, positions). Each token predicts the label of the next one, so no token predicts a row's first.
    """
    rows, places = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)
    return rows * labels.shape[1] + places


def collate(rows: Sequence[Row], pad: int, multiple: int = 1) -> dict[str, torch.Tensor]:
    """Pad rows to the longest one and stack them to a batch of int64 tensors.

    ``multiple``: the number of positions becomes a multiple of it, because GPUs compute fastest with multiples of 8. So
    that few shapes occur, long rows are then filled up to a round length, ``gold_places`` with 0, a place that predicts
    no gold token, and the turns, if rows have several, with turns whose ``mc_labels`` are `IGNORED`.
    ``input_ids``, ``token_type_ids``, ``position_ids``, ``segment_ids`` (-1: padding), ``labels`` and ``visible`` are
    (rows, positions). ``mc_token_ids`` (-1: no candidate) is (turns, candidates); ``mc_labels``, the index of the gold
    candidate, and ``mc_rows``, the row of a turn, are (turns,). ``gold_places``: see `find_gold_places`. The batch has
    everything that the network would otherwise search for, so that a GPU never waits for the CPU.
    """

    # A process without a turn in the last batch computes a row of padding, to stay in step with the others.
    rows = rows or [Row([pad], [pad], [0], [0], [IGNORED], [[0]], [1])]

    def padded(values: Sequence[Sequence[int]], fill: int, multiple: int = 1) -> torch.Tensor:
        length = max(map(len, values))
        if multiple > 1:
            length = rounded(length, multiple, PARTS)
        out = np.full((len(values), length), fill, np.int64)
        for index, value in enumerate(values):
            out[index, :len(value)] = value
        return torch.from_numpy(out)

    fills = {"input_ids": pad, "token_type_ids": pad, "position_ids": 0, "segment_ids": -1, "labels": IGNORED,
             "visible": 1}
    batch = {field: padded([getattr(row, field) for row in rows], fill, multiple) for field, fill in fills.items()}
    turns = [candidates for row in rows for candidates in row.mc_token_ids]
    places, more = find_gold_places(batch["labels"]), -len(turns) % multiple if len(turns) > len(rows) else 0
    of_rows = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row.mc_token_ids) for row in rows]))
    return batch | {
        "gold_places": F.pad(places, (0, -len(places) % (GOLD_MULTIPLE if multiple > 1 else 1))),
        "mc_token_ids": padded(turns + [[0]] * more, NO_CANDIDATE),  # without a candidate, the loss would be NaN
        "mc_labels": torch.tensor([len(candidates) - 1 for candidates in turns] + [IGNORED] * more),
        "mc_rows": F.pad(of_rows, (0, more)),
    }


class TurnDataset(Dataset):
    """The turns of a split as packed rows, which are built on access.

    ``num_candidates``: candidates per turn, from the end of the list; 0: all. ``max_history``: exchanges kept, that is
    ``2 * max_history + 1`` utterances. ``permutations``: the number of copies of each turn; the persona is rotated by
    one sentence from copy to copy. ``no_persona``: leave out the persona. ``max_positions``: the model's maximum.
    ``history_start``: see `build_context`.
    """

    def __init__(self, split: Split, tokenizer: Tokenizer, max_positions: int, num_candidates: int = 0,
                 max_history: int = 2, permutations: int = 1, history_start: int = 0, no_persona: bool = False):
        self.split, self.special, self.max_positions = split, Specials.of(tokenizer), max_positions
        self.history_start, self.no_persona = history_start, no_persona
        self.num_candidates, self.num_utterances = num_candidates, 2 * max_history + 1
        self.permutations = permutations
        # Each row needs its length, its index in the order and its index in the sorted order, eight bytes each.
        require_memory(24 * split.num_turns * permutations, f"--personality_permutations {permutations}", "give fewer")

    @classmethod
    def for_model(cls, model, split: Split, tokenizer: Tokenizer, **choices) -> Self:
        """Make a dataset of ``split`` in the form that ``model`` was trained on; ``choices``: the other arguments."""
        return cls(split, tokenizer, model.max_positions, max_history=model.max_history,
                   history_start=model.history_start, no_persona=model.no_persona, **choices)

    def __len__(self) -> int:
        return self.split.num_turns * self.permutations

    def context(self, turn: int, rotation: int = 0) -> tuple[list, list]:
        """Return persona and history of a turn as lists of lists of token ids."""
        persona = [] if self.no_persona else self.split.token_ids("persona", self.split.turn_dialog[turn])
        cut = len(persona) - rotation % len(persona) if persona else 0
        return persona[cut:] + persona[:cut], self.split.token_ids("history", turn)[-self.num_utterances:]

    def __getitem__(self, index: int) -> Row:
        rotation, turn = divmod(index, self.split.num_turns)
        candidates = self.split.token_ids("candidates", turn)[-self.num_candidates:]
        return self.pack(turn, candidates, rotation)

    def place(self, index: int) -> str:
        """Return the place of a row's turn in the data file, such as ``train[12].utterances[3]``."""
        turn = index % self.split.num_turns
        dialog = self.split.turn_dialog[turn]
        first = np.searchsorted(self.split.turn_dialog, dialog)
        return f"{self.split.name}[{dialog}].utterances[{turn - first}]"

    def pack(self, turn: int, candidates: list[list[int]], rotation: int = 0) -> Row:
        """Pack a turn with the given candidates."""
        context = self.context(turn, rotation)
        return pack_turn(*context, candidates, self.special, self.max_positions, self.history_start)

    CHUNK = 1 << 16  # turns whose lengths are computed at once

    def lengths(self) -> tuple[np.ndarray, int]:
        """Return an upper bound of the tokens in each row, (len(self),) int64, and how many turns lose some context.

        Both come from the table's offsets; no row is built.
        """
        turns = np.arange(self.split.num_turns)
        chunks = [self._lengths(turns[start:start + self.CHUNK]) for start in range(0, len(turns), self.CHUNK)]
        lengths, too_long = zip(*chunks, strict=True) if chunks else ([turns], [0])
        return np.tile(np.concatenate(lengths), self.permutations), sum(too_long)

    def _lengths(self, turns: np.ndarray) -> tuple[np.ndarray, int]:
        """Compute `lengths` of consecutive turns."""
        context, candidates, too_long = self._sizes(turns)
        return context + candidates, int(too_long.sum())

    def _sizes(self, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return per turn the tokens of its context, those of its candidates, and whether it is too long."""
        ends = self.split.table.array("token_offsets")

        def ragged(field: str, rows: np.ndarray, keep: int, extra: int) -> tuple[np.ndarray, np.ndarray]:
            """Sum and largest, over the last ``keep`` strings of each row (0: all), of tokens + ``extra``."""
            name = f"{self.split.name}.{field}"
            offsets = self.split.table.array(f"{name}_offsets")
            first, stop = offsets[rows], offsets[rows + 1]
            strings = self.split.table.array(name)[first[0]:stop[-1]]
            start, stop = np.maximum(first, stop - keep if keep else 0) - first[0], stop - first[0]
            values = np.append(ends[strings + 1] - ends[strings] + extra, 0)
            total = np.append(0, np.cumsum(values))
            largest = np.maximum.reduceat(values, np.stack([start, stop], 1).ravel())[::2]
            return total[stop] - total[start], largest

        persona = 1 + ragged("persona", self.split.turn_dialog[turns], 0, 0)[0] * (not self.no_persona)
        history = ragged("history", turns, self.num_utterances, 1)[0]
        candidates, longest = ragged("candidates", turns, self.num_candidates, 2)
        too_long = (self.history_start or persona) + history + longest > self.max_positions
        if self.history_start:
            too_long |= persona > self.history_start
        return persona + history, candidates, too_long


def longest_persona(split: Split) -> int:
    """Return the number of tokens of ``<bos>`` and persona in the dialog with the longest persona."""
    sizes = np.diff(split.table.array("token_offsets"))
    total = np.append(0, np.cumsum(sizes[split.table.array(f"{split.name}.persona")]))
    return 1 + int(np.diff(total[split.table.array(f"{split.name}.persona_offsets")]).max(initial=0))


class DialogDataset(TurnDataset):
    """A `TurnDataset` with several turns of a dialog per row (`pack_dialog`), so that their history is computed once.

    A row holds consecutive turns of a dialog as long as each continues the history of the one before, and the row fits
    the model; a history that ``max_history`` cuts begins a new row. If a turn has more distractors than
    ``num_candidates`` needs, each of the ``permutations`` takes other ones, counted from the end.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.firsts = self._group()  # the first turn of each row, and the number of all turns

    def __len__(self) -> int:
        return (len(self.firsts) - 1) * self.permutations

    def __getitem__(self, index: int) -> Row:
        rotation, row = divmod(index, len(self.firsts) - 1)
        turns = range(self.firsts[row], self.firsts[row + 1])
        persona, history = self.context(turns[-1], rotation)
        kept = [(min(len(self.split.strings("history", turn)), self.num_utterances), self.candidates(turn, rotation))
                for turn in turns]
        return pack_dialog(persona, history, kept, self.special, self.max_positions, self.history_start)

    def candidates(self, turn: int, rotation: int) -> list[list[int]]:
        """Return the token ids of the candidates for a permutation, the gold one last."""
        *wrong, gold = self.split.token_ids("candidates", turn)
        if 0 < self.num_candidates <= len(wrong):
            count = self.num_candidates - 1
            stop = len(wrong) - rotation * count % (len(wrong) + 1 - count)
            wrong = wrong[stop - count:stop]
        return [*wrong, gold]

    def place(self, index: int) -> str:
        return super().place(int(self.firsts[index % (len(self.firsts) - 1)]))

    def lengths(self) -> tuple[np.ndarray, int]:
        """Return the tokens in each row, (len(self),) int64, and how many turns lose some context.

        The numbers are upper bounds for the first permutation and estimates for others, with their other distractors.
        """
        first, last = self.firsts[:-1], self.firsts[1:] - 1
        context, candidates, too_long = self._sizes(np.arange(self.split.num_turns))
        name, ends = f"{self.split.name}.candidates", self.split.table.array("token_offsets")
        stops = self.split.table.array(f"{name}_offsets")
        golds, count = self.split.table.array(name)[stops[1:] - 1], np.diff(stops)
        golds = ends[golds + 1] - ends[golds]
        # `candidates` counts two control tokens for each. Here <speaker1> and the gold reply are in the context.
        branches = candidates - golds - np.minimum(count, self.num_candidates or count)
        total = context[last] + 1 + golds[last] + np.add.reduceat(branches, first) if len(first) else first
        return np.tile(total, self.permutations), int(too_long.sum())

    def _group(self) -> np.ndarray:
        """Return the index of each row's first turn, ascending, and then the number of all turns."""
        too_long = self._sizes(np.arange(self.split.num_turns))[2]
        firsts, said = [], None  # a turn whose history begins with ``said`` continues the row
        for turn, dialog in enumerate(self.split.turn_dialog.tolist()):
            history = self.split.strings("history", turn)[-self.num_utterances:].tolist()
            if too_long[turn] or said != (dialog, history[:-1]):
                firsts.append(turn)
            said = dialog, [*history, int(self.split.strings("candidates", turn)[-1])]
        return np.array([*firsts, self.split.num_turns])


class LengthBatches(Sampler):
    """Batches of turns of similar length, which need little padding.

    An epoch has every turn once, or ``epoch_batches`` batches if that is not 0; then no turn repeats before all others
    have occurred.

    With a ``seed`` each epoch has a new order (`set_epoch`): turns are shuffled, sorted by length within groups of
    `SORTED_TOGETHER` batches and cut into batches, which are shuffled. Without a seed all turns are sorted, the longest
    first, so that a batch that is too large for the memory fails at once.

    Process ``rank`` of ``world`` gets every ``world``-th turn of each batch, so that all processes together see the
    batches of a single process. If a batch is smaller than ``world``, some processes get no turn.
    """

    SORTED_TOGETHER = 50  # batches

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int | None = None, epoch_batches: int = 0,
                 rank: int = 0, world: int = 1):
        self.lengths, self.batch_size, self.seed, self.epoch_batches = lengths, batch_size, seed, epoch_batches
        self.rank, self.world, self.epoch, self.start = rank, world, 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch whose order the next iteration has, and the batch at which it begins."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.epoch_batches or -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (batch[self.rank::self.world] for batch in self.batches()[self.start:])

    def batches(self) -> list[np.ndarray]:
        """Return the batches of the epoch for all processes together, in order."""
        if self.seed is None:
            order = np.argsort(-self.lengths, kind="stable")
            return np.split(order, range(self.batch_size, len(order), self.batch_size))
        rng = np.random.default_rng([self.seed, self.epoch])
        batches = []
        while len(batches) < len(self):
            order, once = rng.permutation(len(self.lengths)), []
            for start in range(0, len(order), self.SORTED_TOGETHER * self.batch_size):
                group = order[start:start + self.SORTED_TOGETHER * self.batch_size]
                group = group[np.argsort(self.lengths[group], kind="stable")]
                once += np.split(group, range(self.batch_size, len(group), self.batch_size))

            batches += [once[index] for index in rng.permutation(len(once))]
        return batches[:len(self)]


def get_loader(dataset: TurnDataset, lengths: np.ndarray, batch_size: int, seed: int | None = None,
               epoch_batches: int = 0, num_workers: int = 0, pin_memory: bool = False, rank: int = 0,
               world: int = 1) -> DataLoader:
    """Return a loader that yields batches of `collate` in the order of `LengthBatches`."""
    return DataLoader(
        dataset,
        batch_sampler=LengthBatches(lengths, batch_size, seed, epoch_batches, rank, world),
        collate_fn=partial(collate, pad=dataset.special.pad, multiple=8 if pin_memory else 1),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=partial(_ignore_signals, trainer=os.getpid()),
        generator=torch.Generator(),  # otherwise each start of loading would draw from the generator of dropout
    )


def _ignore_signals(worker: int, trainer: int) -> None:
    """Ignore Ctrl-C and a cluster's SIGTERM in a loading process, which works until the trainer itself ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_exit_on_sigterm_from, args=(trainer,), daemon=True).start()


def _exit_on_sigterm_from(trainer: int) -> None:
    """Wait for a SIGTERM that the trainer has sent, and end the process."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)

