"""Test the utterance metrics."""

import math

import pytest

from feedback import utterance_metrics as metrics


def test_rule_score():
    assert metrics.rule_score("what happened to you ?") == 5 + 10
    assert metrics.rule_score("tell me more about it") == 5
    assert metrics.rule_score("really ?") == 2  # a question mark without a question word
    assert metrics.rule_score("") == 0


def test_utterance_metrics():
    assert metrics.sentiment("I love this, it is wonderful!") > 0.5 > -0.5 > metrics.sentiment("I hate it, how awful.")
    assert metrics.sentiment("It is a table.") == 0
    history = ["I have a puppy called Rex", "Puppy owners love their puppy", "yes they do"]
    # among puppy, cats, cats: the bot said puppy in its last turn, and the second cats repeats the first
    assert metrics.repetition("puppy or cats and cats", history) == pytest.approx(-2 / 3)
    assert metrics.repetition("Rex called yes they do", history) == 0  # the other person's words do not count
    assert metrics.repetition("", history) == 0
    assert metrics.similarity("yes they do", history) == pytest.approx(1)
    assert metrics.similarity("my car", history) == 0 and metrics.similarity("yes", []) == 0
    # "yes they do" has five features, its three words and two word pairs; "do" has one: cosine 1 / sqrt(5)
    assert metrics.similarity("do", history) == pytest.approx(1 / math.sqrt(5))
    assert metrics.toxicity("you stupid idiot") < -0.8 < -0.3 < metrics.toxicity("what a lovely day") <= 0
    assert metrics.toxicity(" ") == 0
    said = ["what a lovely day", " ", "you stupid idiot"]
    assert metrics.toxicities(said) == pytest.approx([metrics.toxicity(text) for text in said])


def test_questions_with_any_contractions():
    asked = ["What did you do?", "what's your name ?", "What’s your name?", "what 's your name ?", "who're they ?",
             "where'd you go ?", "how`ve you been ?", "Isn’t it late?", "isn ' t it late ?", "wo n't you come ?",
             "ca n't you ?", "whats up ?", "dont you like it ?", "must we go ?", "ain't it nice ?", "d'you like tea ?"]
    told = ["Really?", "What a day.", "", "it's the dog's ball ?", "they're here , ok ?", "that's what i 'd say .",
            "let's go , ok ?", "you like dogs' toys ?"]
    assert [text for text in asked + told if metrics.question(text)] == asked
    assert metrics.repetition("they can’t sing", ["we can't dance", "oh"]) == pytest.approx(-1 / 3)  # can’t is one word


def test_the_weighted_sum_of_metrics():
    history, text = ["I have a dog.", "What is its name?", "Rex."], "What a lovely name! How old is he?"
    by_hand = (0.15 * metrics.sentiment(text) + 0.25 * 1 + 0.5 * metrics.repetition(text, history)
               + 0.05 * metrics.similarity(text, history) + 0.05 * metrics.toxicity(text))
    assert metrics.weighted([(text, history), ("Rex.", history[:2])])[0] == pytest.approx(by_hand)
    assert metrics.repetition(text, history) == pytest.approx(-2 / 3)  # what and name repeat; lovely is new
    only_questions = dict.fromkeys(metrics.METRICS, 0.0) | {"question": 2.0}
    assert metrics.weighted([(text, history), ("Rex.", [])], only_questions).tolist() == [2.0, 0.0]
