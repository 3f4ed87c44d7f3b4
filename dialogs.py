"""Dialogs into entries of the data format, an entry per side, and entries into splits.

Knows speakers and utterances, neither files nor tokens. Training and conversion share `combine_corpora`.
"""

import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cli import InputError
from corpora import LONGEST_SENTENCE
from words import text_key

HISTORY = 100  # utterances kept before a turn, or 99, so that the list begins with the speaker who opened the dialog
MOST_TURNS = 10_000  # of a dialog; each is kept with its history
TARGETS = ("both", "second", "first")  # whose turns are learnt: both people's, or one speaker's
TRAIN_FRAC = 0.85  # of the dialogs of a file without splits
logger = logging.getLogger("dialogs")


class Utterance(NamedTuple):
    speaker: object
    text: str
    distractors: tuple[str, ...] = ()


class Dialog(NamedTuple):
    """The utterances of a dialog with their speakers, in order."""

    place: str  # where in the file, for messages
    utterances: list[Utterance]
    personas: Mapping[Any, list[str]] = {}  # speaker → sentences
    bot: object = None  # whose turns are to be learnt; None: everybody's
    notes: tuple[str, ...] = ()  # what a person wants to know of it, "with a system message"; they are counted


# ------------------------------------------------------------------------------------------- dialogs into entries


def clean(text: str) -> str:
    """An utterance on one line, without what corpora write for a comma and for silence."""
    text = text.replace("_comma_", ",")
    if "SILENCE" in text:
        text = re.sub(r"__ ?SILENCE ?__", " ", text)
    return " ".join(text.split())


def merge_utterances(turns: Iterable[Utterance]) -> list[Utterance]:
    """Join consecutive utterances of one speaker; leave out empty ones."""
    out: list[Utterance] = []
    spoken = [turn._replace(text=text) for turn in turns if (text := clean(turn.text))]
    for _, of_one in groupby(spoken, key=lambda turn: turn.speaker):
        first, *more = of_one
        out.append(first._replace(text=" ".join([first.text, *(turn.text for turn in more)])) if more else first)
    return out


def make_entries(dialogs: Iterable[Dialog], path: str | Path) -> Iterator[dict]:
    """An entry per side of each dialog: the second speaker's, then that of who opened it.

    The opening has nothing before it and is nobody's turn. A dialog without a turn, or of more than two people, is
    left out; at the end these are counted in a warning. Raises `InputError` for a dialog without end.
    """
    left_out, first = Counter(), {}
    for dialog in dialogs:
        check_length(dialog.utterances, path, dialog.place)
        turns = merge_utterances(dialog.utterances)
        if (longest := max([len(turn.text) for turn in turns], default=0)) > LONGEST_SENTENCE:
            raise InputError(f"{path}: in the dialog of {dialog.place} somebody says {longest:,} letters at once, more "
                             f"than {LONGEST_SENTENCE:,}; split that")
        if len({turn.speaker for turn in turns}) > 2:
            reason = "more than two people speak"
        elif any(sides := list(_sides(dialog, turns))):
            yield from sides
            continue
        else:
            reason = "nobody answers anybody"
        left_out[reason] += 1
        first.setdefault(reason, dialog.place)
    for reason, count in left_out.items():
        logger.warning("%s: %s dialogs left out because in them %s; the first at %s", path, f"{count:,}", reason,
                       first[reason])


def check_length(turns: list, path: str | Path, place: str) -> None:
    if len(turns) > MOST_TURNS:
        raise InputError(f"{path}: the dialog of {place} has more than {MOST_TURNS:,} utterances; divide it, in plain "
                         "text by an empty line")


def _sides(dialog: Dialog, turns: list[Utterance]) -> Iterator[dict]:
    said = [turn.text for turn in turns]
    for side in (1, 2):
        places = range(side, len(said), 2)
        if places and dialog.bot in (None, turns[side].speaker):
            yield {
                "personality": dialog.personas.get(turns[side].speaker, []),
                "utterances": [{
                    "history": said[max(0, place - HISTORY + side % 2):place],
                    "candidates": [*turns[place].distractors, said[place]],
                } for place in places],
            }


def keep_target(entries: Iterable[dict], target: str) -> Iterator[dict]:
    """The turns of one of `TARGETS`. The second speaker's turns follow an odd number of utterances."""
    for entry in entries:
        turns = [turn for turn in entry["utterances"]
                 if target == "both" or len(turn["history"]) % 2 == (target == "second")]
        if turns:
            yield entry | {"utterances": turns}


def drop_silence(corpus: Iterable[dict]) -> Iterator[dict]:
    """Entries of the published JSON, which writes ``__ SILENCE __`` where the bot opens the dialog."""
    for entry in corpus:
        turns = []
        for turn in entry["utterances"]:
            history = turn["history"]
            said = merge_utterances(Utterance(back % 2, text)
                                    for back, text in zip(range(len(history), 0, -1), history, strict=True))

            if said and said[-1].speaker == 1:
                turns.append({"history": [text for _, text, _ in said], "candidates": turn["candidates"]})
        if turns:
            yield {"personality": entry.get("personality", []), "utterances": turns}


# ------------------------------------------------------------------------------------------------ which dialog it is


class Side(NamedTuple):
    """What an entry tells of its dialog: hashes of what is said in it, which texts that say the same share."""

    role: int  # 1: the side that answers, 0: the side that opened the dialog
    size: int  # utterances
    whole: int  # hash of all of them
    less: int  # hash of all but the last

    @classmethod
    def of(cls, entry: dict) -> "Side":
        """All that is said as far as the entry's last turn. Histories that were cut are put together again."""
        said: list[str] = []
        for turn in entry["utterances"]:
            history = turn["history"]
            said += history[len(said):] if len(history) > len(said) else history[-1:]
            said.append(turn["candidates"][-1])
        alike = tuple(map(text_key, said))
        return cls(len(entry["utterances"][0]["history"]) % 2, len(said), hash(alike), hash(alike[:-1]))


class DialogNumbers:
    """Numbers the dialogs that entries are of, an entry at a time.

    The two sides of a dialog get one number: one of them ends with the dialog's last utterance, the other with the one
    before. All that is said is compared, so that dialogs which begin alike stay apart.
    """

    def __init__(self):
        self.longest: list[Side] = []  # of each dialog, the side that knows more of it
        self._alone: dict[tuple, list[int]] = {}  # what the other side will be recognised by → dialogs that lack it

    def number(self, entry: dict) -> int:
        """The number of the entry's dialog, counted from 0."""
        side = Side.of(entry)
        known_by = ((1 - side.role, side.less, "whole"), (1 - side.role, side.whole, "less"))
        if found := [self._alone[key][-1] for key in known_by if key in self._alone]:
            number = max(found)  # a dialog's sides mostly follow one another
            self._pair(number)
            self.longest[number] = max(self.longest[number], side, key=lambda one: one.size)
            return number
        number = len(self.longest)
        self.longest.append(side)
        for key in self._keys(side):
            self._alone.setdefault(key, []).append(number)
        return number

    def same(self) -> np.ndarray:
        """Of each number, one that it shares with the dialogs in which the same is said: (dialogs,)."""
        first: dict[int, int] = {}
        return np.array([first.setdefault(side.whole, number) for number, side in enumerate(self.longest)], np.int64)

    @staticmethod
    def _keys(side: Side) -> tuple[tuple, tuple]:
        return (side.role, side.whole, "whole"), (side.role, side.less, "less")

    def _pair(self, number: int) -> None:
        """This dialog has both sides."""
        for key in self._keys(self.longest[number]):
            self._alone[key].remove(number)
            if not self._alone[key]:
                del self._alone[key]


# ------------------------------------------------------------------------------------------------------------ splits


def combine_corpora(parts: Iterable[Mapping[str | None, Iterable[dict]]], name: str | Path, target: str = "both",
                    train_frac: float | None = None, seed: int = 0, keep_repeated: bool = False,
                    ) -> dict[str, Iterable[dict]]:
    """Corpora as one, split by split, of their turns those of ``target``.

    Dialogs without a split, and with ``train_frac`` those of training and validation too, are divided by chance. What
    a later split repeats is left out of training (`drop_repeated`), unless ``keep_repeated``.
    """
    parts = list(parts)
    splits: dict = {split: chain.from_iterable([part.get(split, []) for part in parts])
              for split in dict.fromkeys(split for part in parts for split in part)}
    if None in splits or train_frac is not None:
        train_frac = TRAIN_FRAC if train_frac is None else train_frac
        logger.info("%s: %g of the dialogs are for training, the others for validation", name, train_frac)
        dialogs = chain.from_iterable(splits.pop(split, []) for split in (None, "train", "valid"))
        splits = divide_dialogs(dialogs, train_frac, seed, name, target) | splits
    if "train" in splits and not keep_repeated:
        splits = drop_repeated(splits, name)
    return {split: keep_target(entries, target) for split, entries in splits.items()}


def divide_dialogs(entries: Iterable[dict], train_frac: float, seed: int, name: str | Path,
                   target: str = "both") -> dict[str, list[dict]]:
    """``train`` and ``valid``, by chance; both sides of a dialog fall to the same. Raises `InputError` for one dialog.

    ``train_frac``: the share of dialogs that is for training, at least one and never all. Dialogs in which the same is
    said stay together; what has no turn of ``target`` is left out.
    """
    numbers, kept = DialogNumbers(), []
    for entry in entries:
        number = numbers.number(entry)
        kept += ((number, one) for one in keep_target([entry], target))
    same, dialogs = numbers.same().tolist(), {}
    for number, entry in kept:
        dialogs.setdefault(same[number], []).append(entry)
    if len(dialogs) < 2:
        raise InputError(f"{name}: has {len(dialogs)} dialogs, too few to train on some and validate on others; "
                         "bring two or more, an empty line between them in plain text")
    order = random.Random(seed).sample(list(dialogs), len(dialogs))
    cut = min(max(1, round(train_frac * len(order))), len(order) - 1)
    return {split: [entry for key in keys for entry in dialogs[key]]
            for split, keys in (("train", order[:cut]), ("valid", order[cut:]))}


def drop_repeated(splits: Mapping[str, Iterable[dict]], name: str | Path) -> dict[str, Iterable[dict]]:
    """The splits, of ``train`` without the dialogs in which the same is said as in one of another split.

    These are counted in the log. Training is still read once, an entry at a time; the other splits are kept in memory.
    If all of training were left out, it stays.
    """
    splits = {split: entries if split == "train" else list(entries) for split, entries in splits.items()}
    wholes, lesses = set(), set()
    for entries in (entries for split, entries in splits.items() if split != "train"):
        numbers = DialogNumbers()
        for entry in entries:
            numbers.number(entry)
        wholes |= {side.whole for side in numbers.longest}
        lesses |= {side.less for side in numbers.longest}

    def is_repeated(sides: list[dict]) -> bool:
        # Where the other side is missing, so may be the last utterance: one more or less makes no other dialog.
        longest = max(map(Side.of, sides), key=lambda side: side.size)
        return longest.whole in wholes or longest.whole in lesses or longest.less in wholes

    def unseen() -> Iterator[dict]:
        dialogs, left_out, held = 0, 0, []  # held: what is left out, while there is nothing else
        for _, of_one in groupby(splits["train"], key=DialogNumbers().number):
            sides = list(of_one)
            dialogs += 1
            if not is_repeated(sides):
                held.clear()
                yield from sides
                continue
            left_out += 1
            if left_out == dialogs:
                held += sides
        others = " or ".join(sorted(splits.keys() - {"train"}, key=lambda split: (split != "valid", split)))
        if held:
            logger.warning("%s: every training dialog is in %s, too, so that none is left out; the figures will say "
                           "how well they are remembered", name, others)
            yield from held
        elif left_out:
            logger.info("%s: %s of %s training dialogs are left out, because they are in %s, too "
                        "(--keep_repeated keeps them)", name, f"{left_out:,}", f"{dialogs:,}", others)

    return splits | {"train": unseen()}
