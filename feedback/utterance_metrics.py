"""Measure qualities of an utterance automatically.

The metrics are those of Saleh et al. (2020, "Hierarchical reinforcement learning for open-domain dialog"). Libraries
are imported where they are used, because each takes about a second and annotating needs none.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from cli import InputError

PRONOUNS = "who whom whose what when where why which how".split()
AUXILIARIES = "is are am was were do does did have has had can could will would shall should may might must".split()
NEGATED = ("isn't aren't ain't wasn't weren't don't doesn't didn't haven't hasn't hadn't can't couldn't won't wouldn't "
           "shan't shouldn't mayn't mightn't mustn't needn't daren't").split()
SHORTENED = [f"{word}'{end}" for word in PRONOUNS for end in ("s", "re", "d", "ll", "ve", "m")]  # "what's", "who've"
QUESTION_WORDS = frozenset(PRONOUNS + AUXILIARIES + NEGATED + SHORTENED + ["d'you", "d'ya"])
# Chats often omit the apostrophe: "whats up ?". Without it, "who're" would be another word.
UNMARKED = frozenset(word.replace("'", "") for word in QUESTION_WORDS) - {"whore"}
APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼ´`＇", "'"))


def lowercase_words(text: str) -> list[str]:
    """Split a text into lower-case words; apostrophes within words are kept, all as ``'``.

    Contractions that a tokenizer or a corpus has split ("ca n't", "isn ' t") become whole words again.
    """
    text = text.lower().translate(APOSTROPHES)
    text = re.sub(r"(?<=\w) *(n?) ?' ?(t|s|re|d|ll|ve|m)\b", r"\1'\2", text)
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text)


def check_libraries() -> None:
    """Raise `InputError` if a library that the metrics need is missing."""
    try:
        import profanity_check  # noqa: F401
        import sklearn  # noqa: F401
        import vaderSentiment  # noqa: F401
    except ImportError as error:
        raise InputError(f"the utterance metrics need {error.name}; pip install -r requirements/feedback.txt") from None


# Each metric takes an utterance and the history, oldest first, and returns a number; higher is better.


def sentiment(utterance: str, history: Sequence[str] = ()) -> float:
    """Return VADER's compound score (Hutto and Gilbert 2014), from -1 (negative) to 1 (positive)."""
    return _vader().polarity_scores(utterance)["compound"]


def question(utterance: str, history: Sequence[str] = ()) -> float:
    """Return 1 if the utterance has a question mark and a question word, else 0."""
    return float(asks_question(utterance))


def asks_question(utterance: str) -> bool:
    return "?" in utterance and any(word in QUESTION_WORDS or word in UNMARKED for word in lowercase_words(utterance))


def rule_score(reply: str) -> float:
    """Score a reply as the simulated annotator does: the number of its words, plus 10 if it asks a question."""
    return len(reply.split()) + 10.0 * asks_question(reply)


def repetition(utterance: str, history: Sequence[str] = ()) -> float:
    """Return minus the share of words that the speaker has said before, from -1 (nothing new) to 0.

    A word counts as repeated if it occurs earlier in the utterance or in one of the speaker's own turns: every second
    turn of ``history``, counted from its end. Words of fewer than four letters are ignored, because most of them are
    function words.
    """
    said = {word for text in list(history)[-2::-2] for word in lowercase_words(text)}
    repeated = total = 0
    for word in lowercase_words(utterance):
        if len(word) >= 4:
            repeated, total = repeated + (word in said), total + 1
            said.add(word)
    return -repeated / total if total else 0.0


def similarity(utterance: str, history: Sequence[str] = ()) -> float:
    """Return the cosine similarity, 0 to 1, of the utterance and the previous one, over words and word pairs."""
    if not history:
        return 0.0
    rows = _vectorizer().transform([utterance, history[-1]])
    return float(rows[0].multiply(rows[1]).sum())


def toxicity(utterance: str, history: Sequence[str] = ()) -> float:
    """Return minus the probability of profanity from profanity-check's linear model, from -1 (abusive) to 0."""
    return float(toxicities([utterance])[0])


def toxicities(utterances: Sequence[str]) -> np.ndarray:
    """Return the `toxicity` of each utterance, (utterances,); a call takes 3 ms, and 0.01 ms more per utterance."""
    from profanity_check import predict_prob  # half a second to import

    said = np.array([bool(utterance.strip()) for utterance in utterances], bool)
    return np.where(said, -predict_prob(utterances), 0.0) if len(utterances) else np.zeros(0)


METRICS: dict[str, Callable[..., float]] = {one.__name__: one for one in
                                            (sentiment, question, repetition, similarity, toxicity)}
WEIGHTS = {"sentiment": 0.15, "question": 0.25, "repetition": 0.5, "similarity": 0.05, "toxicity": 0.05}


@cache
def _vader():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


@cache
def _vectorizer():
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(ngram_range=(1, 2), alternate_sign=False)


def _values(metric: Callable[..., float], said: Sequence[tuple[str, Sequence[str]]]) -> np.ndarray:
    if metric is toxicity:
        return toxicities([utterance for utterance, _ in said])
    return np.array([metric(*one) for one in said])


def measure(said: Sequence[tuple[str, Sequence[str]]]) -> np.ndarray:
    """Compute all metrics of utterances with their histories, (utterances, 5), in the order of `METRICS`."""
    return np.stack([_values(metric, said) for metric in METRICS.values()], 1)


def weighted(said: Sequence[tuple[str, Sequence[str]]], weights: dict[str, float] = WEIGHTS) -> np.ndarray:
    """Compute the weighted sum of the metrics, as a reward, for utterances with their histories, (utterances,)."""
    return sum((weights[name] * _values(metric, said) for name, metric in METRICS.items() if weights[name]),
               np.zeros(len(said)))
