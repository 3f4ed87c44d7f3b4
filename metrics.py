"""Compute the metrics of an evaluation: hits@k, perplexity, F1, calibration, and their confidence intervals.

Every metric is defined here, once. The functions take texts and records and return numbers; they use no network, no
files and no HTML.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from words import normalized, separate_letters, text_key

if TYPE_CHECKING:
    from tables import Split, TokenTable

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------- hits@k


def rank_of_right(scores, right):
    """Return the rank of the best right candidate, counted from 1: integers of shape (…,).

    ``scores`` and ``right`` (booleans) both have the shape (…, candidates) and are numpy arrays or torch tensors.
    Candidates are ranked by score; on ties the earlier candidate comes first, as in ParlAI's agents. The gold
    candidate is the last one, so if it ties with a wrong candidate, this is not a hit.
    """
    place = (right | ~right).cumsum(-1)  # 1, 2, …
    mine, other = scores[..., :, None], scores[..., None, :]
    before = (mine > other) | (mine == other) & (place[..., :, None] < place[..., None, :])
    return (before | ~right[..., None, :]).all(-1).sum(-1) + 1


def gold_rank_by_words(scores: Sequence[float], texts: Sequence[str]) -> int:
    """Return the rank of the gold reply, the last of ``texts``, counted from 1.

    Other candidates with the same words, after ParlAI's normalisation, count as the gold reply too.
    """
    gold = normalized(texts[-1])
    return int(rank_of_right(np.array(scores), np.array([normalized(text) == gold for text in texts])))


def choice_metrics(records: list[dict], split: "Split") -> dict[str, float | None]:
    """Return Hits@k, MRR, and the accuracy and F1 of the chosen candidates.

    Hits@k is the share of turns with the gold reply among the k best candidates. MRR is the mean of 1 / rank of the
    gold reply. Each of ``records`` has the ``scores`` of all candidates and the text of the best one as ``reply``.
    Turns with a single candidate leave no choice and are skipped; if all turns are like this, Hits@1 is None.
    """
    chosen = [turn for turn, record in enumerate(records) if len(record["scores"]) > 1]
    if len(chosen) < len(records):
        logger.warning("%s of %s turns have the gold reply as their only candidate, so there is nothing to choose; %s",
                       f"{len(records) - len(chosen):,}", f"{len(records):,}",
                       "Hits@k, MRR, F1 and accuracy skip them" if chosen else "hits@k cannot be measured")
    if not chosen:
        return {"Hits@1": None}
    places = [gold_rank_by_words(records[turn]["scores"], split.texts("candidates", turn)) for turn in chosen]
    hits = {f"Hits@{k}": fmean(place <= k for place in places) for k in (1, 5, 10)}
    return hits | {"MRR": fmean(1 / place for place in places)} | text_metrics(records, split, chosen)

def softmax(scores: Sequence[float]) -> np.ndarray:
    exponentials = np.exp(np.array(scores) - max(scores))
    return exponentials / exponentials.sum()


def calibration(scores: Iterable[Sequence[float]], right: Sequence[bool], bins: int = 10) -> list[dict]:
    """Compare the probability of the likeliest candidate with how often this candidate is right.

    ``scores``: the candidates' scores, per turn; ``right``: whether the best one is right, per turn. Return a
    dictionary for each bin of probabilities that has turns: its limits ``from`` and ``to``, the number of ``turns``,
    the mean ``confidence`` (probability) and the ``accuracy``.
    """
    confidence, right = np.array([softmax(row).max() for row in scores]), np.array(right)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return [{"from": n / bins, "to": (n + 1) / bins, "turns": int((place == n).sum()),
             "confidence": float(confidence[place == n].mean()), "accuracy": float(right[place == n].mean())}
            for n in range(bins) if (place == n).any()]


def calibration_error(bins: list[dict]) -> float:
    """Return the expected calibration error (Guo et al. 2017): |confidence - accuracy| of each bin, mean over turns."""
    total = sum(one["turns"] for one in bins)
    return sum(one["turns"] * abs(one["confidence"] - one["accuracy"]) for one in bins) / total


# --------------------------------------------------------------------------------------------------- perplexity


def split_words(text: str) -> list[str]:
    """Split a text into words as the ConvAI2 dictionary does: at spaces, with . , ; : ! ? as words of their own."""
    return re.sub(r"([.,;:!?])", r" \1 ", text).split()


def count_words(table: "TokenTable") -> Counter:
    """Count each word of the data. Each persona sentence and each utterance of a dialog is counted once."""
    counts = Counter()
    for split in table.values():
        last_turns = dict(zip(split.turn_dialog.tolist(), range(split.num_turns), strict=True))
        for dialog in range(len(split)):
            counts.update(word for text in split.texts("persona", dialog) for word in split_words(text))
        for turn in last_turns.values():  # its history holds all earlier utterances
            said = [*split.texts("history", turn), *split.texts("candidates", turn)[-1:]]
            counts.update(word for text in said for word in split_words(text))
    return counts


def perplexities(records: list[dict]) -> dict[str, float]:
    """Return the perplexity per token and the perplexity per word, the latter by ConvAI2's protocol.

    A perplexity is the exponential of the mean negative log-likelihood (nats). The perplexity per word is left out if
    most words are unknown, because it would describe only the few that are known.
    """
    total = Counter()
    for record in records:
        total.update(record)
    figures = {"Token PPL": math.exp(total["nll"] / total["tokens"])}
    known, unknown = total["words"], total["unknown_words"]
    if unknown:
        logger.info("%s of the replies' %s words are not in the dictionary; Word PPL skips them",
                    f"{unknown:,}", f"{known + unknown:,}")
    if known > unknown:
        return figures | {"Word PPL": math.exp(total["word_nll"] / known)}
    logger.warning("Word PPL is left out, because the tokenizer cannot spell %s of the replies' %s words; compare "
                   "models by Token PPL, or use a tokenizer made for this language", f"{unknown:,}",
                   f"{known + unknown:,}")
    return figures


# ----------------------------------------------------------------------------------------------------------- F1


def f1_score(reply: str, gold: str) -> float:
    """Return the F1 of a reply: the harmonic mean of precision and recall of its words against the gold reply's words.

    Texts are normalised as in ParlAI. Replies that differ from the gold reply only in spaces also score 1, because
    GPT-1's tokenizer cannot distinguish "cannot" from "can not".

    >>> f1_score("I have two big dogs!", "i have a dog")  # 2 common words; 5 words against 3, "a" does not count
    0.5
    """
    reply_words, gold_words = normalized(reply), normalized(gold)
    common = sum((Counter(reply_words) & Counter(gold_words)).values())
    if gold_words and text_key(reply) == text_key(gold):
        return 1.0
    return 2 * common / (len(reply_words) + len(gold_words)) if common else 0.0


def text_metrics(records: list[dict], split: "Split", turns: Iterable[int] | None = None) -> dict[str, float]:
    """Return the mean F1 of the replies, and the accuracy: the share of replies that equal the gold reply.

    Both compare words after ParlAI's normalisation. ``turns``: the turns to include (default: all).
    """
    turns = range(len(records)) if turns is None else turns
    pairs = [(records[turn]["reply"], split.texts("candidates", turn)[-1]) for turn in turns]
    if empty := sum(not normalized(gold) for _, gold in pairs):
        logger.warning("%s of %s gold replies have no words: their F1 is 0", f"{empty:,}", f"{len(pairs):,}")
    return {"F1": fmean(f1_score(*pair) for pair in pairs),
            "Accuracy": fmean(normalized(reply) == normalized(gold) for reply, gold in pairs)}


def variety(replies: Sequence[str]) -> dict[str, float]:
    """Return the mean length of replies and the variety of their words.

    ``Words per reply``: the length, for Chinese and Japanese in characters. ``Distinct-1`` and ``Distinct-2``: the
    share of distinct words and word pairs among those of all replies (Li et al. 2016). ``Stutters``: the share of
    replies with a word, not a punctuation mark, three times in a row.
    """
    lengths, stutters, grams = [], [], {1: Counter(), 2: Counter()}
    for reply in map(split_words, map(separate_letters, replies)):
        lengths.append(len(reply))
        stutters.append(any(first == second == third and any(map(str.isalnum, first))
                            for first, second, third in zip(reply, reply[1:], reply[2:], strict=False)))
        for n, counts in grams.items():
            counts.update(zip(*(reply[start:] for start in range(n)), strict=False))
    return {"Words per reply": fmean(lengths),
            **{f"Distinct-{n}": len(counts) / max(1, counts.total()) for n, counts in grams.items()},
            "Stutters": fmean(stutters)}


def reply_metrics(records: list[dict], split: "Split", max_history: int) -> dict[str, float]:
    """Return `text_metrics`, the `variety` of the replies, and the share of replies that are ``Copied``.

    A reply is copied if it occurs word for word in the persona or in the part of the history that the model saw.
    """
    copied = []
    for turn, record in enumerate(records):
        reply = split_words(separate_letters(record["reply"]))
        seen = split.texts("persona", split.turn_dialog[turn]) + split.texts("history", turn)[-(2 * max_history + 1):]
        within = (f" {' '.join(split_words(separate_letters(text)))} ".lower() for text in seen)
        copied.append(bool(reply) and any(f" {' '.join(reply)} ".lower() in text for text in within))
    return text_metrics(records, split) | variety([record["reply"] for record in records]) | {"Copied": fmean(copied)}


# ---------------------------------------------------------------------------------------------------- intervals


def wilson(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson (1927) score interval of the share ``count / total``; ``z`` 1.96 gives 95 % confidence."""
    share, weight = count / total, z * z / total
    middle = share + weight / 2
    half = z * (share * (1 - share) / total + weight / (4 * total)) ** 0.5
    return max(0.0, (middle - half) / (1 + weight)), min(1.0, (middle + half) / (1 + weight))


def interval(values: ArrayLike, weights: ArrayLike, groups: ArrayLike, draws: int = 1000,
             seed: int = 0) -> tuple[float, float]:
    """Return the 95 % confidence interval of ``sum(values) / sum(weights)``, by a bootstrap over dialogs.

    ``values``, ``weights`` and ``groups`` (the number of each turn's dialog) all have the shape (turns,). Turns of the
    same dialog are not independent, so whole dialogs are drawn with replacement: the percentile bootstrap of Efron and
    Tibshirani (1993).
    """
    group_of_turn = np.unique(groups, return_inverse=True)[1]
    number = group_of_turn.max() + 1
    drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=draws)
    totals, counts = (drawn @ np.bincount(group_of_turn, values, number) for values in (values, weights))
    low, high = np.quantile(totals[counts > 0] / counts[counts > 0], [0.025, 0.975]).tolist()
    return low, high


def turn_values(records: dict[str, list[dict]], split: "Split") -> dict[str, np.ndarray]:
    """Return the values and weights of all turns, (2, turns), for each main metric.

    A metric is the sum of its values divided by the sum of its weights; a perplexity is the exponential of that.
    ``records`` has the evaluations ``hits@1``, ``ppl``, ``f1`` and ``consistency``. Turns without a choice have weight
    0 in Hits@1, and turns without a persona in the use of persona.
    """
    found, ones = dict[str, list](), np.ones(split.num_turns)
    if "hits@1" in records:
        scores = [record["scores"] for record in records["hits@1"]]
        found["Hits@1"] = [[len(one) > 1 and gold_rank_by_words(one, split.texts("candidates", turn)) == 1
                            for turn, one in enumerate(scores)], [len(one) > 1 for one in scores]]
    if "ppl" in records:
        for name, total, count in (("Token PPL", "nll", "tokens"), ("Word PPL", "word_nll", "words")):
            found[name] = [[record[field] for record in records["ppl"]] for field in (total, count)]
    if "f1" in records:
        found["F1"] = [[f1_score(record["reply"], split.texts("candidates", turn)[-1])
                        for turn, record in enumerate(records["f1"])], ones]
    if "consistency" in records:
        for name, field in (("Use of persona", "use_of_persona"),
                            ("Use of persona, gold replies", "gold_use_of_persona")):
            uses = [record[field] for record in records["consistency"]]
            found[name] = [[use or 0 for use in uses], [use is not None for use in uses]]
    arrays = {name: np.array(both, float) for name, both in found.items()}
    return {name: both for name, both in arrays.items() if both[1].any()}


def intervals(records: dict[str, list[dict]], split: "Split") -> dict[str, tuple[float, float]]:
    """Return the `interval` of each main metric (`turn_values`)."""
    found = {name: interval(values, weights, split.turn_dialog)
             for name, (values, weights) in turn_values(records, split).items()}
    return {name: (math.exp(low), math.exp(high)) if name.endswith("PPL") else (low, high)
            for name, (low, high) in found.items()}


def compare(first: np.ndarray, second: np.ndarray, groups: ArrayLike, exponential: bool = False, draws: int = 9999,
            seed: int = 0) -> dict[str, float]:
    """Compare a metric of two models on the same turns, whose `turn_values` are given, (2, turns) each.

    ``groups`` (turns,): the number of each turn's dialog. Return the metric of the ``first`` and the ``second`` model,
    their ``difference``, its 95 % confidence interval, ``low`` to ``high``, by a paired bootstrap over dialogs, and
    ``p``: how often a difference at least as large, in either direction, comes about if the two models' dialogs are
    exchanged at random (permutation test). With a single dialog, interval and ``p`` are NaN. ``exponential``: the
    metric is the exponential of the mean.
    """
    from scipy import stats  # half a second, which only a comparison takes

    dialog = np.unique(groups, return_inverse=True)[1]
    number = dialog.max() + 1
    totals, counts = (np.concatenate([np.bincount(dialog, part, number) for part in parts])
                      for parts in ((first[0], second[0]), (first[1], second[1])))

    def metric(places: np.ndarray, axis: int) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # a resample of dialogs without a choice
            mean = totals[places].sum(axis) / counts[places].sum(axis)
        return np.exp(mean) if exponential else mean

    def difference(one: np.ndarray, other: np.ndarray, axis: int) -> np.ndarray:
        return metric(one, axis) - metric(other, axis)

    both, how = (np.arange(number), number + np.arange(number)), {"vectorized": True, "n_resamples": draws, "rng": seed}
    low = high = p = math.nan
    if number > 1:
        drawn = stats.bootstrap(both, difference, paired=True, method="percentile", batch=1000, **how)
        low, high = np.nanquantile(drawn.bootstrap_distribution, [0.025, 0.975]).tolist()
        p = float(stats.permutation_test(both, difference, permutation_type="samples", batch=1000, **how).pvalue)
    one, other = (float(metric(places, 0)) for places in both)
    return {"first": one, "second": other, "difference": one - other, "low": low, "high": high, "p": p}
