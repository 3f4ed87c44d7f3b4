"""Turn dialogs into entries of the data format, one per side, and combine entries into splits.

This file knows speakers and utterances, but neither files nor tokens. Training and conversion both use
`combine_corpora`.
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

MOST_HISTORY = 100  # utterances kept before a turn; 99 if a kept history would not begin with the dialog's opener
MOST_TURNS = 10_000  # utterances of a dialog; each turn repeats its history, so the size grows much faster
TARGETS = ("both", "second", "first")  # the speakers whose turns are learnt
TRAIN_FRAC = 0.85  # the training share of the dialogs in a file without splits
logger = logging.getLogger("dialogs")


class Utterance(NamedTuple):
    """The words of a speaker in one turn, with distractors if the corpus has some."""

    speaker: object
    text: str
    distractors: tuple[str, ...] = ()


class Dialog(NamedTuple):
    """The utterances of a dialog, in order, and what is known about its speakers."""

    place: str  # the dialog's place in the file, for messages
    utterances: list[Utterance]
    personas: Mapping[Any, list[str]] = {}  # speaker → sentences
    bot: object = None  # the only speaker whose turns are learnt; None: both speakers' turns are
    notes: tuple[str, ...] = ()  # remarks for the log, such as "with a system message", which counts each of them


# ------------------------------------------------------------------------------------------- dialogs into entries


def clean(text: str) -> str:
    """Put an utterance on one line, and replace the marks that corpora use for a comma and for silence."""
    text = text.replace("_comma_", ",")
    if "SILENCE" in text:
        text = re.sub(r"__ ?SILENCE ?__", " ", text)
    return " ".join(text.split())


def merge_utterances(utterances: Iterable[Utterance]) -> list[Utterance]:
    """Clean utterances, leave out empty ones and join consecutive ones of one speaker."""
    out: list[Utterance] = []
    spoken = [one._replace(text=text) for one in utterances if (text := clean(one.text))]
    for _, of_speaker in groupby(spoken, key=lambda one: one.speaker):
        first, *more = of_speaker
        out.append(first._replace(text=" ".join([first.text, *(one.text for one in more)])) if more else first)
    return out


def make_entries(dialogs: Iterable[Dialog], path: str | Path) -> Iterator[dict]:
    """Yield an entry per side of each dialog: first the second speaker's, then the opening speaker's.

    The opening utterance is not a turn, because it has no history. Dialogs without a turn and those of more than two
    speakers are left out and counted in a warning at the end.
    Raises `InputError` for a dialog that is longer than `MOST_TURNS` or has an utterance longer than
    `corpora.LONGEST_SENTENCE`; ``path`` is the file's name for messages.
    """
    left_out, first = Counter(), {}
    for dialog in dialogs:
        check_length(dialog.utterances, path, dialog.place)
        merged = merge_utterances(dialog.utterances)
        if (longest := max([len(one.text) for one in merged], default=0)) > LONGEST_SENTENCE:
            raise InputError(f"{path}: an utterance of the dialog at {dialog.place} has {longest:,} characters, more "
                             f"than {LONGEST_SENTENCE:,}; split it")
        if len({one.speaker for one in merged}) > 2:
            reason = "they have more than two speakers"
        elif any(sides := list(_sides(dialog, merged))):
            yield from sides
            continue
        else:
            reason = "they have no reply"
        left_out[reason] += 1
        first.setdefault(reason, dialog.place)
    for reason, count in left_out.items():
        logger.warning("%s: %s dialogs are left out because %s; the first is at %s", path, f"{count:,}", reason,
                       first[reason])


def check_length(utterances: list, path: str | Path, place: str) -> None:
    """Raise `InputError` if a dialog has more than `MOST_TURNS` utterances."""
    if len(utterances) > MOST_TURNS:
        raise InputError(f"{path}: the dialog at {place} has more than {MOST_TURNS:,} utterances; divide it, in plain "
                         "text by an empty line")


def _sides(dialog: Dialog, merged: list[Utterance]) -> Iterator[dict]:
    """Yield the entries of a dialog whose ``merged`` utterances alternate between two speakers."""
    said = [one.text for one in merged]
    for side in (1, 2):
        places = range(side, len(said), 2)
        if places and dialog.bot in (None, merged[side].speaker):
            yield {
                "personality": dialog.personas.get(merged[side].speaker, []),
                "utterances": [{
                    "history": said[max(0, place - MOST_HISTORY + side % 2):place],
                    "candidates": [*merged[place].distractors, said[place]],

                } for place in places],
            }


def keep_target(entries: Iterable[dict], target: str) -> Iterator[dict]:
    """Keep the turns of ``target``, one of `TARGETS`; the second speaker's turns have histories of odd length."""
    for entry in entries:
        turns = [turn for turn in entry["utterances"]
                 if target == "both" or len(turn["history"]) % 2 == (target == "second")]
        if turns:
            yield entry | {"utterances": turns}


def drop_silence(corpus: Iterable[dict]) -> Iterator[dict]:
    """Remove from entries of the published JSON the ``__ SILENCE __`` that it writes where the bot opens a dialog."""
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


# ------------------------------------------------------------------------------------------------ numbers of dialogs


class Side(NamedTuple):
    """The dialog as one of its two entries shows it: hashes of the utterances, compared by `words.text_key`."""

    role: int  # 1: the side that answers, 0: the side that opened the dialog
    size: int  # number of utterances up to the entry's last turn
    whole: int  # hash of these utterances
    all_but_last: int  # hash of these utterances without the last one

    @classmethod
    def of_entry(cls, entry: dict) -> "Side":
        """Collect the utterances of an entry, also where its histories were cut, and hash them."""
        said: list[str] = []
        for turn in entry["utterances"]:
            history = turn["history"]
            said += history[len(said):] if len(history) > len(said) else history[-1:]
            said.append(turn["candidates"][-1])
        alike = tuple(map(text_key, said))
        return cls(len(entry["utterances"][0]["history"]) % 2, len(said), hash(alike), hash(alike[:-1]))


class DialogNumbers:
    """The numbers of dialogs, assigned one entry at a time; the two sides of a dialog get one number.

    One side ends with the dialog's last utterance, the other with the one before. All utterances are compared, so
    dialogs that only begin alike get different numbers.
    """

    def __init__(self):
        self.longest: list[Side] = []  # per dialog, the side with more utterances
        self._unpaired: dict[tuple, list[int]] = {}  # key of the missing other side → dialogs without it

    def number(self, entry: dict) -> int:
        """Return the number of the entry's dialog, counted from 0."""
        side = Side.of_entry(entry)
        other_keys = ((1 - side.role, side.all_but_last, "whole"), (1 - side.role, side.whole, "all_but_last"))
        if found := [self._unpaired[key][-1] for key in other_keys if key in self._unpaired]:
            number = max(found)  # the two sides of a dialog mostly follow one another
            self._pair(number)
            self.longest[number] = max(self.longest[number], side, key=lambda one: one.size)
            return number
        number = len(self.longest)
        self.longest.append(side)
        for key in self._keys(side):
            self._unpaired.setdefault(key, []).append(number)
        return number

    def representatives(self) -> np.ndarray:
        """Return for each dialog the number of the first dialog with the same utterances, (dialogs,) int64."""
        first: dict[int, int] = {}
        return np.array([first.setdefault(side.whole, number) for number, side in enumerate(self.longest)], np.int64)

    @staticmethod
    def _keys(side: Side) -> tuple[tuple, tuple]:
        return (side.role, side.whole, "whole"), (side.role, side.all_but_last, "all_but_last")

    def _pair(self, number: int) -> None:
        """Record that both sides of a dialog are known."""
        for key in self._keys(self.longest[number]):
            self._unpaired[key].remove(number)
            if not self._unpaired[key]:
                del self._unpaired[key]


# ------------------------------------------------------------------------------------------------------------ splits


def combine_corpora(parts: Iterable[Mapping[str | None, Iterable[dict]]], name: str | Path, target: str = "both",
                    train_frac: float | None = None, seed: int = 0, keep_repeated: bool = False,
                    ) -> dict[str, Iterable[dict]]:
    """Combine corpora split by split, and keep only the turns of ``target``, one of `TARGETS`.

    ``parts``: per corpus, entries by split; the split None holds dialogs that have none. These are divided at random
    into training and validation, and with ``train_frac`` those of training and validation are divided anew as well.
    Training dialogs that another split repeats are left out (`drop_repeated`), unless ``keep_repeated``. ``name`` is
    for messages. Returns entries by split, each to be iterated once.
    """
    parts = list(parts)
    splits: dict = {split: chain.from_iterable([part.get(split, []) for part in parts])
              for split in dict.fromkeys(split for part in parts for split in part)}
    if None in splits or train_frac is not None:
        train_frac = TRAIN_FRAC if train_frac is None else train_frac
        logger.info("%s: a share of %g of the dialogs is for training, the others are for validation", name, train_frac)
        dialogs = chain.from_iterable(splits.pop(split, []) for split in (None, "train", "valid"))
        splits = divide_dialogs(dialogs, train_frac, seed, name, target) | splits
    if "train" in splits and not keep_repeated:
        splits = drop_repeated(splits, name)
    return {split: keep_target(entries, target) for split, entries in splits.items()}


def divide_dialogs(entries: Iterable[dict], train_frac: float, seed: int, name: str | Path,
                   target: str = "both") -> dict[str, list[dict]]:
    """Divide entries at random into ``train`` and ``valid``; both sides and all repetitions of a dialog stay together.

    ``train_frac``: the training share of the dialogs; each split gets at least one. Entries without a turn of
    ``target`` are left out. Raises `InputError` for fewer than two dialogs.
    """
    numbers, kept = DialogNumbers(), []
    for entry in entries:
        number = numbers.number(entry)
        kept += ((number, one) for one in keep_target([entry], target))
    representatives, dialogs = numbers.representatives().tolist(), {}
    for number, entry in kept:
        dialogs.setdefault(representatives[number], []).append(entry)
    if len(dialogs) < 2:
        raise InputError(f"{name}: has {len(dialogs)} dialogs, too few to train on some and validate on others; "
                         "add dialogs, in plain text with an empty line between them")
    order = random.Random(seed).sample(list(dialogs), len(dialogs))
    cut = min(max(1, round(train_frac * len(order))), len(order) - 1)
    return {split: [entry for key in keys for entry in dialogs[key]]
            for split, keys in (("train", order[:cut]), ("valid", order[cut:]))}


def drop_repeated(splits: Mapping[str, Iterable[dict]], name: str | Path) -> dict[str, Iterable[dict]]:
    """Leave out of ``train`` the dialogs that another split repeats, and log how many there are.

    If that would leave out all training dialogs, they are kept, with a warning. Training is read one entry at a time;
    the other splits are kept in memory.
    """
    splits = {split: entries if split == "train" else list(entries) for split, entries in splits.items()}
    seen_whole, seen_all_but_last = set(), set()
    for entries in (entries for split, entries in splits.items() if split != "train"):
        numbers = DialogNumbers()
        for entry in entries:
            numbers.number(entry)
        seen_whole |= {side.whole for side in numbers.longest}
        seen_all_but_last |= {side.all_but_last for side in numbers.longest}

    def is_repeated(sides: list[dict]) -> bool:
        # A dialog of one side may lack its last utterance, so one utterance more or less is still the same dialog.
        longest = max(map(Side.of_entry, sides), key=lambda side: side.size)
        return longest.whole in seen_whole or longest.whole in seen_all_but_last or longest.all_but_last in seen_whole

    def unseen() -> Iterator[dict]:
        dialogs, left_out, held = 0, 0, []  # held: the entries left out, as long as none has been kept
        for _, group in groupby(splits["train"], key=DialogNumbers().number):
            sides = list(group)
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
            logger.warning("%s: every training dialog is also in %s, so none is left out; metrics will show how well "
                           "the model remembers them", name, others)
            yield from held
        elif left_out:
            logger.info("%s: %s of %s training dialogs are left out because they are also in %s "
                        "(--keep_repeated keeps them)", name, f"{left_out:,}", f"{dialogs:,}", others)

    return splits | {"train": unseen()}
