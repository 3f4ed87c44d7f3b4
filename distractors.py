"""Wrong answers for turns that bring none: replies of other dialogs, drawn by chance or for the words they share.

Knows numbers of dialogs and strings, and words; nothing about files or tokens.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from words import bare, words

__all__ = ["COUNT", "HOW", "draw_distractors", "words"]

HOW = ("random", "hard", "none")
COUNT = 19  # a turn, as in PERSONA-CHAT
FOLLOWED = 2000  # replies looked at a turn, so that the time grows with the number of turns and not with its square
STRETCH = 1 << 14  # turns drawn for at once


def draw_distractors(replies: np.ndarray, dialogs: np.ndarray, texts: Sequence[str], how: str = "random",
                     count: int = COUNT, seed: int = 0, of: np.ndarray | None = None,
                     tokens: Mapping[int, tuple] | None = None) -> np.ndarray:
    """Numbers of ``count`` different wrong replies to the turns ``of`` (default: all), -1 where there are no more.

    ``replies`` (turns,): the right ones, as numbers of strings in ``texts``; ``dialogs`` (turns,): which dialog a turn
    is of, whose replies are no distractors for it. ``how``: "random", each reply as likely as it is frequent; or
    "hard", those that share most with the right one, its words weighted by their rarity (tf-idf), the hardest first,
    filled up by chance. No distractor is the right reply in another spelling (`words.bare`), or to the tokenizer, if
    ``tokens`` gives each reply's ids. Returns (turns of ``of``, count), of the dtype of ``replies``.
    """
    rng = np.random.default_rng(seed)
    of = np.arange(len(replies)) if of is None else of
    out = np.full((len(of), count), -1, replies.dtype)
    usable = _Usable(replies, dialogs, texts, tokens)
    alike = _Alike(replies, texts, rng) if how == "hard" else None
    stretches = range(0, len(of), STRETCH)
    for start in tqdm(stretches, desc=f"Drawing {how} distractors", delay=1, unit_scale=STRETCH,
                      unit=" turns"):
        turns = of[start:start + STRETCH]
        drawn = rng.integers(len(replies), size=(len(turns), 2 * count))
        for row, (turn, chance) in enumerate(zip(turns, drawn, strict=True), start):
            places = np.concatenate([usable(alike.best(turn), turn, 4 * count), chance]) if alike else chance
            chosen = usable(places, turn)
            if len(chosen) < count:  # few replies to draw from
                chosen = usable(np.append(places, rng.permutation(len(replies))[:FOLLOWED]), turn)
            chosen = replies[chosen[:count]]
            out[row, :len(chosen)] = chosen
    return out


class _Usable:
    """Which replies are wrong for a turn, and different from each other."""

    def __init__(self, replies: np.ndarray, dialogs: np.ndarray, texts: Sequence[str],
                 tokens: Mapping[int, tuple] | None):
        strings, of_turn = np.unique(replies, return_inverse=True)
        readings = [[bare(texts[number]) for number in strings]]
        if tokens is not None:
            readings.append([tokens[number] for number in strings.tolist()])
        self.dialogs, self.same = dialogs, []  # for each reading: (turns,), equal where the replies are
        for reading in readings:
            numbers: dict = {}
            self.same.append(np.array([numbers.setdefault(one, len(numbers)) for one in reading], np.int64)[of_turn])

    def __call__(self, places: np.ndarray, turn: int, most: int | None = None) -> np.ndarray:
        """Those of ``places``, in order; of the first ``most`` wrong ones."""
        places = places[self.dialogs[places] != self.dialogs[turn]]
        for same in self.same:
            places = places[same[places] != same[turn]]
        places = places[:most]
        for same in self.same:
            places = places[np.sort(np.unique(same[places], return_index=True)[1])]
        return places


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

    def best(self, turn: int) -> np.ndarray:
        """Turns whose replies share words with that of ``turn``, those that share most first; rare words are followed
        before frequent ones."""
        followed, weights = [np.empty(0, np.int64)], [np.empty(0)]
        for word in sorted(self.words[turn], key=lambda word: (-self.rarity[word], word)):
            if sum(map(len, followed)) < FOLLOWED:
                followed.append(self.having[word])
                weights.append(np.full(len(self.having[word]), self.rarity[word]))
        found, place = np.unique(np.concatenate(followed), return_inverse=True)
        score = np.bincount(place, np.concatenate(weights), minlength=len(found)) / self.length[found]
        return found[np.argsort(-score, kind="stable")]

