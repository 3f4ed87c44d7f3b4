"""Draw wrong candidates for turns that have none: replies of other dialogs, at random or similar to the gold reply.

This file knows numbers of dialogs, strings and words, but neither files nor tokenizers.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from words import text_key, words

METHODS = ("random", "hard", "none")
PER_TURN = 19  # as in PERSONA-CHAT
MOST_FOLLOWED = 2000  # replies compared per turn, so that the time grows linearly with the number of turns
CHUNK = 1 << 14  # turns whose random numbers are drawn at once


def draw_distractors(replies: np.ndarray, dialogs: np.ndarray, texts: Sequence[str], method: str = "random",
                     count: int = PER_TURN, seed: int = 0, turns: np.ndarray | None = None,
                     tokens: Mapping[int, tuple] | None = None) -> np.ndarray:
    """Draw ``count`` different distractors for each of ``turns``, by default for all turns.

    ``replies`` (turns,): the gold replies, as indices into ``texts``. ``dialogs`` (turns,): the number of each turn's
    dialog; replies of the same dialog are no distractors. ``method``: "random" draws each reply as often as it was
    said; "hard" takes the replies that share most words with the gold one, weighted by rarity (tf-idf), the most
    similar first, and fills up at random. A reply that says the same as the gold one is never drawn, by
    `words.text_key` and, if ``tokens`` maps each reply to its token ids, by these.

    Returns indices into ``texts``, (len(turns), count), -1 where there are not enough replies.
    """
    rng = np.random.default_rng(seed)
    turns = np.arange(len(replies)) if turns is None else turns
    out = np.full((len(turns), count), -1, replies.dtype)
    usable = _UsableReplies(replies, dialogs, texts, tokens)
    similar = _SimilarReplies(replies, texts, rng) if method == "hard" else None
    for start in tqdm(range(0, len(turns), CHUNK), desc=f"Drawing {method} distractors", delay=1, unit_scale=CHUNK,
                      unit=" turns"):
        chunk = turns[start:start + CHUNK]
        drawn = rng.integers(len(replies), size=(len(chunk), 2 * count))
        for row, (turn, at_random) in enumerate(zip(chunk, drawn, strict=True), start):
            found = at_random
            if similar:
                found = np.concatenate([usable(similar.best(turn), turn, 4 * count), at_random])
            chosen = usable(found, turn)
            if len(chosen) < count:  # there are few replies to draw from
                chosen = usable(np.append(found, rng.permutation(len(replies))[:MOST_FOLLOWED]), turn)
            chosen = replies[chosen[:count]]
            out[row, :len(chosen)] = chosen
    return out


class _UsableReplies:
    """A filter of replies that keeps those that are wrong for a turn and differ from each other."""

    def __init__(self, replies: np.ndarray, dialogs: np.ndarray, texts: Sequence[str],
                 tokens: Mapping[int, tuple] | None):
        strings, string_of_turn = np.unique(replies, return_inverse=True)
        readings: list[list] = [[text_key(texts[number]) for number in strings]]
        if tokens is not None:
            readings.append([tokens[number] for number in strings.tolist()])
        self.dialogs, self.same = dialogs, []  # per reading (turns,): equal numbers for equal replies
        for reading in readings:
            numbers: dict = {}
            self.same.append(np.array([numbers.setdefault(one, len(numbers)) for one in reading],
                                      np.int64)[string_of_turn])

    def __call__(self, found: np.ndarray, turn: int, most: int | None = None) -> np.ndarray:
        """Return those of the turns ``found`` whose replies are usable, in order.

        Only the first ``most`` wrong replies are compared with each other.
        """
        found = found[self.dialogs[found] != self.dialogs[turn]]
        for same in self.same:
            found = found[same[found] != same[turn]]
        found = found[:most]
        for same in self.same:
            found = found[np.sort(np.unique(same[found], return_index=True)[1])]
        return found


class _SimilarReplies:
    """An index from each word to the replies that contain it, to find replies that share words with a given one."""

    def __init__(self, replies: np.ndarray, texts: Sequence[str], rng: np.random.Generator):
        self.words = [frozenset(words(texts[number])) for number in replies]
        turns_with = defaultdict(list)
        for turn in rng.permutation(len(replies)).tolist():  # so that the first `MOST_FOLLOWED` are a random sample
            for word in self.words[turn]:
                turns_with[word].append(turn)
        self.turns_with = {word: np.array(turns[:MOST_FOLLOWED]) for word, turns in turns_with.items()}
        self.rarity = {word: np.log(len(replies) / len(turns)) for word, turns in turns_with.items()}
        self.length = np.sqrt([max(1, len(one)) for one in self.words])

    def best(self, turn: int) -> np.ndarray:
        """Return the turns whose replies share words with that of ``turn``, the most similar first.

        Rare words are looked up before frequent ones, until `MOST_FOLLOWED` replies have been found.
        """
        followed, weights = [np.empty(0, np.int64)], [np.empty(0)]
        for word in sorted(self.words[turn], key=lambda word: (-self.rarity[word], word)):
            if sum(map(len, followed)) < MOST_FOLLOWED:
                followed.append(self.turns_with[word])
                weights.append(np.full(len(self.turns_with[word]), self.rarity[word]))
        found, place = np.unique(np.concatenate(followed), return_inverse=True)
        score = np.bincount(place, np.concatenate(weights), minlength=len(found)) / self.length[found]
        return found[np.argsort(-score, kind="stable")]
