"""Wrong answers for turns that bring none: replies of other dialogs, drawn by chance or for the words they share.

Knows numbers of dialogs and strings, and words; nothing about files or tokens.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

HOW = ("random", "hard", "none")
COUNT = 19  # a turn, as in PERSONA-CHAT
FOLLOWED = 2000  # replies looked at a turn, so that the time grows with the number of turns and not with its square
STRETCH = 1 << 14  # turns drawn for at once


def draw_distractors(replies: np.ndarray, dialogs: np.ndarray, texts: Sequence[str], how: str = "random",
                     count: int = COUNT, seed: int = 0, of: np.ndarray | None = None) -> np.ndarray:
    """Numbers of ``count`` different wrong replies to the turns ``of`` (default: all), -1 where there are no more.

    ``replies`` (turns,): the right ones, as numbers of strings in ``texts``; ``dialogs`` (turns,): which dialog a turn
    is of, whose replies are no distractors for it. ``how``: "random", each reply as likely as it is frequent; or
    "hard", those that share most with the right one, its words weighted by their rarity (tf-idf), filled up by chance.
    Returns (turns of ``of``, count), of the dtype of ``replies``.
    """
    rng = np.random.default_rng(seed)
    of = np.arange(len(replies)) if of is None else of
    out = np.full((len(of), count), -1, replies.dtype)
    alike = _Alike(replies, texts, rng) if how == "hard" else None
    stretches = range(0, len(of), STRETCH)
    for start in tqdm(stretches, desc=f"Drawing {how} distractors", delay=1, unit_scale=STRETCH,
                      unit=" turns"):
        turns = of[start:start + STRETCH]
        drawn = rng.integers(len(replies), size=(len(turns), 2 * count))
        for row, (turn, chance) in enumerate(zip(turns, drawn, strict=True), start):
            places = np.concatenate([alike.best(turn, 2 * count), chance]) if alike else chance
            chosen = _usable(places, turn, replies, dialogs)
            if len(chosen) < count:  # few replies to draw from
                chosen = _usable(np.append(places, rng.permutation(len(replies))[:FOLLOWED]), turn, replies, dialogs)
            out[row, :min(count, len(chosen))] = chosen[:count]
    return out


def _usable(places: np.ndarray, turn: int, replies: np.ndarray, dialogs: np.ndarray) -> np.ndarray:
    """The different replies at ``places``, in order, but for the right one and those of the same dialog."""
    numbers = replies[places[(dialogs[places] != dialogs[turn]) & (replies[places] != replies[turn])]]
    return numbers[np.sort(np.unique(numbers, return_index=True)[1])]


class _Alike:
    """For each word the replies that have it."""

    def __init__(self, replies: np.ndarray, texts: Sequence[str], rng: np.random.Generator):
        self.words = [frozenset(words(texts[number])) for number in replies]
        having = defaultdict(list)
        for turn in rng.permutation(len(replies)).tolist():  # of words in too many replies, a sample is followed
            for word in self.words[turn]:
                having[word].append(turn)
        self.having = {word: np.array(turns[:FOLLOWED]) for word, turns in having.items()}
        self.rarity = {word: np.log(len(replies) / len(turns)) for word, turns in having.items()}
        self.length = np.sqrt([max(1, len(one)) for one in self.words])

    def best(self, turn: int, count: int) -> np.ndarray:
        """Up to ``count`` turns whose replies share most with that of ``turn``, its rarest words followed first."""
        followed, weights = [np.empty(0, np.int64)], [np.empty(0)]
        for word in sorted(self.words[turn], key=lambda word: (-self.rarity[word], word)):
            if sum(map(len, followed)) < FOLLOWED:
                followed.append(self.having[word])
                weights.append(np.full(len(self.having[word]), self.rarity[word]))
        found, place = np.unique(np.concatenate(followed), return_inverse=True)
        score = np.bincount(place, np.concatenate(weights), minlength=len(found)) / self.length[found]
        return found[np.argsort(-score, kind="stable")[:count]]


UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Chinese and Japanese letters, between whose words is no space


def words(text: str) -> list[str]:
    """Lower-case words; of Chinese and Japanese, letters."""
    return re.findall(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+", text.lower())
