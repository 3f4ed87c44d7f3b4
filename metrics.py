"""Figures out of texts and records: hits, perplexity, F1, calibration, each defined once.

Texts and records in, numbers out; knows neither the network nor files nor pages.
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
    """The ranks, counted from 1, of the first candidates that are ``right``, (…,) integers.

    ``scores`` (…, candidates) and ``right``, booleans of that shape, are arrays of numpy or tensors of torch.
    Candidates are ranked by score, of equals the earlier first, as ParlAI's agents hand them over; a hit@k is a right
    one among the first k. The gold candidate is the last, so that a tie with a wrong one is no hit.
    """
    place = (right | ~right).cumsum(-1)  # 1, 2, …
    mine, other = scores[..., :, None], scores[..., None, :]
    before = (mine > other) | (mine == other) & (place[..., :, None] < place[..., None, :])
    return (before | ~right[..., None, :]).all(-1).sum(-1) + 1


def gold_rank_by_words(scores: Sequence[float], texts: Sequence[str]) -> int:
    """The rank of the gold reply, the last of ``texts``, or of the same words elsewhere, by ParlAI's normalisation."""
    gold = normalized(texts[-1])
    return int(rank_of_right(np.array(scores), np.array([normalized(text) == gold for text in texts])))


def choice_metrics(records: list[dict], split: "Split") -> dict[str, float | None]:
    """Hits@k: the share of turns whose gold reply is among the k best candidates; MRR: the mean of 1 / its rank.

    ``records`` have ``scores`` and the best candidate as ``reply``, of whose text accuracy and F1 are. Turns with one
    candidate, where there is nothing to choose, are left out; if there are no others, Hits@1 is None.
    """
    chosen = [turn for turn, record in enumerate(records) if len(record["scores"]) > 1]
    if len(chosen) < len(records):
        logger.warning("%s of %s turns have the gold reply as their only candidate: there is nothing to choose, and %s",
                       f"{len(records) - len(chosen):,}", f"{len(records):,}",
                       "the choice's figures leave them out" if chosen else "hits@k says nothing")
    if not chosen:
        return {"Hits@1": None}
    places = [gold_rank_by_words(records[turn]["scores"], split.texts("candidates", turn)) for turn in chosen]
    hits = {f"Hits@{k}": fmean(place <= k for place in places) for k in (1, 5, 10)}
    return hits | {"MRR": fmean(1 / place for place in places)} | text_metrics(records, split, chosen)

def softmax(scores: Sequence[float]) -> np.ndarray:
    exponentials = np.exp(np.array(scores) - max(scores))
    return exponentials / exponentials.sum()


def calibration(scores: Iterable[Sequence[float]], right: Sequence[bool], bins: int = 10) -> list[dict]:
    """How often the likeliest candidate is ``right``, by the probability that the choice head gives it.

    ``scores`` of the candidates of each turn. Returns the bins that have turns: ``from``, ``to``, ``turns``, mean
    ``confidence`` and ``accuracy``. Their weighted mean difference is the expected calibration error (Guo et al. 2017).
    """
    confidence, right = np.array([softmax(row).max() for row in scores]), np.array(right)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return [{"from": n / bins, "to": (n + 1) / bins, "turns": int((place == n).sum()),
             "confidence": float(confidence[place == n].mean()), "accuracy": float(right[place == n].mean())}
            for n in range(bins) if (place == n).any()]


def calibration_error(bins: list[dict]) -> float:
    """Mean over turns of |confidence - accuracy| of their bin."""
    total = sum(one["turns"] for one in bins)
    return sum(one["turns"] * abs(one["confidence"] - one["accuracy"]) for one in bins) / total


# --------------------------------------------------------------------------------------------------- perplexity


def split_words(text: str) -> list[str]:
    """Words of the ConvAI2 dictionary: what stands between spaces, with . , ; : ! ? set apart."""
    return re.sub(r"([.,;:!?])", r" \1 ", text).split()


def count_words(table: "TokenTable") -> Counter:
    """How often each word stands in the data: every persona sentence and every utterance of a dialog, once."""
    counts = Counter()
    for split in table.values():
        last_turns = dict(zip(split.turn_dialog.tolist(), range(split.num_turns), strict=True))
        for dialog in range(len(split)):
            counts.update(word for text in split.texts("persona", dialog) for word in split_words(text))
        for turn in last_turns.values():  # whose history is all that was said before
            said = [*split.texts("history", turn), *split.texts("candidates", turn)[-1:]]
            counts.update(word for text in said for word in split_words(text))
    return counts


def perplexities(records: list[dict]) -> dict[str, float]:
    """Exponentials of the mean negative log-likelihood: a token, and a word by ConvAI2's protocol.

    The second is left out where most of the words count as unknown, because it would be a figure of the others alone.
    """
    total = Counter()
    for record in records:
        total.update(record)
    figures = {"Token PPL": math.exp(total["nll"] / total["tokens"])}
    known, unknown = total["words"], total["unknown_words"]
    if unknown:
        logger.info("%s of the replies' %s words are not in the dictionary and left out of Word PPL",
                    f"{unknown:,}", f"{known + unknown:,}")
    if known > unknown:
        return figures | {"Word PPL": math.exp(total["word_nll"] / known)}
    logger.warning("Word PPL is left out: %s of the replies' %s words are none that the tokenizer can spell; compare "
                   "models by Token PPL, or take a tokenizer made for the language", f"{unknown:,}",
                   f"{known + unknown:,}")
    return figures


# ----------------------------------------------------------------------------------------------------------- F1


def f1_score(reply: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the reply's bag of words against the gold reply's.

    1 as well where the two differ in spaces alone: to GPT-1's tokenizer "cannot" and "can not" are one.
    """
    reply_words, gold_words = normalized(reply), normalized(gold)
    common = sum((Counter(reply_words) & Counter(gold_words)).values())
    if gold_words and text_key(reply) == text_key(gold):
        return 1.0
    return 2 * common / (len(reply_words) + len(gold_words)) if common else 0.0


def text_metrics(records: list[dict], split: "Split", turns: Iterable[int] | None = None) -> dict[str, float]:
    """F1 of each ``reply`` against the gold one, and accuracy: the share that is the gold reply word for word.

    ``turns``: which of them, default all.
    """
    turns = range(len(records)) if turns is None else turns
    pairs = [(records[turn]["reply"], split.texts("candidates", turn)[-1]) for turn in turns]
    if empty := sum(not normalized(gold) for _, gold in pairs):
        logger.warning("%s of %s gold replies have no words: their F1 is 0", f"{empty:,}", f"{len(pairs):,}")
    return {"F1": fmean(f1_score(*pair) for pair in pairs),
            "Accuracy": fmean(normalized(reply) == normalized(gold) for reply, gold in pairs)}


def reply_metrics(records: list[dict], split: "Split", max_history: int) -> dict[str, float]:
    """`text_metrics`, and what the replies look like.

    Mean length in words (of Chinese and Japanese, letters); distinct-1 and distinct-2, different words and pairs of
    words over all of them (Li et al. 2016); copied: the share of replies that stand word for word in what the model
    saw, persona or history.
    """
    copied, lengths, grams = [], [], {1: Counter(), 2: Counter()}
    for turn, record in enumerate(records):
        reply = split_words(separate_letters(record["reply"]))
        seen = split.texts("persona", split.turn_dialog[turn]) + split.texts("history", turn)[-(2 * max_history + 1):]
        within = (f" {' '.join(split_words(separate_letters(text)))} ".lower() for text in seen)
        copied.append(bool(reply) and any(f" {' '.join(reply)} ".lower() in text for text in within))
        lengths.append(len(reply))
        for n, counts in grams.items():
            counts.update(zip(*(reply[start:] for start in range(n)), strict=False))
    distinct = {f"Distinct-{n}": len(counts) / max(1, counts.total()) for n, counts in grams.items()}
    looks = {"Words a reply": fmean(lengths), **distinct, "Copied": fmean(copied)}
    return text_metrics(records, split) | looks


# ---------------------------------------------------------------------------------------------------- intervals


def interval(values: ArrayLike, weights: ArrayLike, groups: ArrayLike, draws: int = 1000,
             seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of ``sum(values) / sum(weights)``, both (turns,), over draws of whole ``groups``, the dialogs.

    Turns of one dialog resemble each other, so dialogs are drawn, with replacement: the percentile bootstrap of Efron
    and Tibshirani (1993).
    """
    group_of_turn = np.unique(groups, return_inverse=True)[1]
    number = group_of_turn.max() + 1
    drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=draws)
    totals, counts = (drawn @ np.bincount(group_of_turn, values, number) for values in (values, weights))
    low, high = np.quantile(totals[counts > 0] / counts[counts > 0], [0.025, 0.975]).tolist()
    return low, high


def intervals(records: dict[str, list[dict]], split: "Split") -> dict[str, tuple[float, float]]:
    """The `interval` of each main figure of an evaluation; ``records`` by kind: ``hits@1``, ``ppl``, ``f1``."""
    dialogs, found = np.asarray(split.turn_dialog), {}
    if "hits@1" in records:
        chosen = [turn for turn, record in enumerate(records["hits@1"]) if len(record["scores"]) > 1]
        hits = [gold_rank_by_words(records["hits@1"][turn]["scores"], split.texts("candidates", turn)) == 1
                for turn in chosen]
        if chosen:
            found["Hits@1"] = interval(hits, np.ones(len(hits)), dialogs[chosen])
    if "ppl" in records:
        for name, total, count in (("Token PPL", "nll", "tokens"), ("Word PPL", "word_nll", "words")):
            values, weights = ([record[field] for record in records["ppl"]] for field in (total, count))
            if sum(weights):
                low, high = interval(values, weights, dialogs)
                found[name] = math.exp(low), math.exp(high)
    if "f1" in records:
        scores = [f1_score(record["reply"], split.texts("candidates", turn)[-1])
                  for turn, record in enumerate(records["f1"])]
        found["F1"] = interval(scores, np.ones(len(scores)), dialogs)
    return found
