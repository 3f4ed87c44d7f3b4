"""Compare the ConvAI2 metrics with their definitions, computed in another way."""

import json
import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import FAMILIES, TINY, error_line, script, shared, templates
from hypothesis import given
from hypothesis import strategies as st
from test_decoders import FAMILIES as DECODERS
from test_decoders import sentencepiece, words_and_digits, write_checkpoint

import metrics
from corpora import read_corpus
from inputs import TurnDataset, build_input_from_segments
from metrics import (
    calibration,
    calibration_error,
    choice_metrics,
    count_words,
    gold_rank_by_words,
    perplexities,
    rank_of_right,
    reply_metrics,
    split_words,
)
from outputs import gold_likelihoods
from report import write_report
from tokenization import get_tokenizer
from utils import get_dataset
from weights import add_special_tokens_, load_model


def table_of(corpus: dict, folder):
    """Write a corpus to ``folder``, and return its token table."""
    (folder / "data.json").write_text(json.dumps(corpus))
    return get_dataset(get_tokenizer(str(TINY)), str(folder / "data.json"), str(folder / "cache"))


def setting(family: str, data, tmp_path):
    """Load a 2019 run, or a random Llama with another tokenizer, and the validation turns of a data file."""
    if family in FAMILIES:
        run = str(shared(f"golden/run-2019-{family}"))
    else:
        torch.manual_seed(6)
        kind = {"llama-bytes": words_and_digits, "llama-sentencepiece": sentencepiece}[family]
        run = str(write_checkpoint(tmp_path / "llama", DECODERS["llama"], kind()))
    tokenizer, model = get_tokenizer(run), load_model(run)
    add_special_tokens_(model, tokenizer)
    table = get_dataset(tokenizer, str(data), str(tmp_path / "cache"))
    return model, tokenizer, table, TurnDataset(table["valid"], tokenizer, 512, num_candidates=1)


@pytest.mark.parametrize(("family", "legacy"), [
    *((family, legacy) for family in FAMILIES for legacy in (False, True)), ("llama-bytes", False),
    ("llama-sentencepiece", False)])
def test_word_perplexity_word_by_word(family, legacy, tmp_path):
    """Use 50 turns of templates, and a turn whose words are tokenised differently when more words follow."""
    corpus = read_corpus(templates())
    corpus = {"train": corpus["train"][:20], "valid": corpus["valid"][:12]}
    odd = "i can not.stop , it isn't the u.s.a .  o'neill's 3,5 ... ok?! Zürich 日本"
    corpus["valid"].append({"personality": ["odd"], "utterances": [{"history": ["hi"], "candidates": [odd]}]})
    data = tmp_path / "data.json"
    data.write_text(json.dumps(corpus))
    model, tokenizer, table, dataset = setting(family, data, tmp_path)
    counts = count_words(table)
    got = dict(gold_likelihoods(model, dataset, tokenizer, counts, batch_size=8, legacy_gpt2_words=legacy))
    assert len(got) == len(dataset) >= 50

    total, scored = 0.0, 0
    for turn, record in got.items():
        persona, history = dataset.context(turn)
        words, nll = split_words(dataset.split.texts("candidates", turn)[-1]), 0.0
        known = 0
        for place, word in enumerate(words):
            so_far = tokenizer.encode(" ".join(words[:place])) if place else []
            built = build_input_from_segments(persona, history, so_far, tokenizer, with_eos=False)
            with torch.no_grad():
                logits = model(torch.tensor([built["input_ids"]]),
                               token_type_ids=torch.tensor([built["token_type_ids"]])).logits[0, -1]
            shares = shares_of(counts, tokenizer, place > 0 and not legacy)
            probabilities = logits.double().softmax(-1)
            if word not in shares:
                continue
            mass = sum(probabilities[piece].item() * share for piece, share in shares.values())
            piece, share = shares[word]
            nll -= math.log(probabilities[piece].item() * share / mass)
            known += 1
        assert record["words"] == known and record["unknown_words"] == len(words) - known
        assert record["word_nll"] == pytest.approx(nll, abs=1e-3)
        total, scored = total + nll, scored + known
    assert perplexities(list(got.values()))["Word PPL"] == pytest.approx(math.exp(total / scored), rel=1e-5)


SHARES = {}


def shares_of(counts, tokenizer, after_space: bool) -> dict[str, tuple[int, float]]:
    """Compute the protocol independently: word → (first piece, share among the words with that first piece)."""
    key = id(tokenizer), after_space, id(counts)
    if key not in SHARES:
        first = {}
        for word in counts:
            if type(tokenizer).__name__ != "OpenAIGPTTokenizer":
                ids = tokenizer.encode(("x " if after_space else "") + word)
                ids = ids[len(tokenizer.encode("x")):] if after_space else ids
            else:
                ids = [tokenizer.convert_tokens_to_ids(one.value)
                       for one in tokenizer.backend_tokenizer.model.tokenize(word.lower())]
            if ids and ids[0] != tokenizer.unk_token_id:
                first[word] = ids[0]
        mass = Counter()
        for word, piece in first.items():
            mass[piece] += counts[word] + 5
        SHARES[key] = {word: (piece, (counts[word] + 5) / mass[piece]) for word, piece in first.items()}
    return SHARES[key]


def test_the_dictionary_counts_every_text_once(tmp_path):
    corpus = {"train": [{"personality": ["i like red .", "red , red"], "utterances": [
        {"history": ["hello red"], "candidates": ["not counted", "blue !"]},
        {"history": ["hello red", "blue !", "yes"], "candidates": ["not counted", "it's done.now"]}]}],
        "valid": [{"personality": [], "utterances": [{"history": ["red"], "candidates": ["wrong", "green"]}]}]}
    table = table_of(corpus, tmp_path)
    assert count_words(table) == {"red": 5, "i": 1, "like": 1, ".": 2, ",": 1, "hello": 1, "blue": 1, "!": 1,
                                  "yes": 1, "it's": 1, "done": 1, "now": 1, "green": 1}


def test_ranks(tmp_path, caplog):
    corpus = {"train": [], "valid": [{"personality": [], "utterances": [
        {"history": ["a"], "candidates": ["x", "y", "blue"]},
        {"history": ["a"], "candidates": ["Blue?", "y", "a blues"]},
        {"history": ["a"], "candidates": [*"abcdefg", "red"]}, {"history": ["a"], "candidates": ["alone"]}]}]}
    table = table_of(corpus, tmp_path)
    records = [{"scores": [1.0, 2.0, 3.0], "reply": "blue"}, {"scores": [5.0, 2.0, 2.0], "reply": "Blue?"},
               {"scores": [9.0] * 7 + [1.0], "reply": "a"}, {"scores": [4.0], "reply": "alone"}]
    metrics = choice_metrics(records, table["valid"])  # ranks 1, 3 (after a tie), 8 and none
    assert metrics == pytest.approx({"Hits@1": 1 / 3, "Hits@5": 2 / 3, "Hits@10": 1.0, "MRR": (1 + 1 / 3 + 1 / 8) / 3,
                                     "F1": 1 / 3, "Accuracy": 1 / 3})
    assert "1 of 4 turns have the gold reply as their only candidate, so there is nothing to choose" in caplog.text


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, 2.5]), st.booleans()), min_size=1, max_size=8))
def test_ranks_are_counted_as_in_parlai(candidates):
    """Sort candidates by score as ParlAI does, the earlier first on ties, and find the first right one."""
    scores, right = [score for score, _ in candidates], [right for _, right in candidates[:-1]] + [True]
    ranked = sorted(range(len(scores)), key=lambda number: -scores[number])
    wanted = 1 + [right[number] for number in ranked].index(True)
    assert rank_of_right(np.array(scores), np.array(right)) == wanted
    assert rank_of_right(torch.tensor([scores, scores]), torch.tensor([right, right])).tolist() == [wanted] * 2
    assert gold_rank_by_words(scores, ["The Gold!" if one else f"wrong {n}" for n, one in enumerate(right)]) == wanted


def test_a_repeated_gold_reply_is_a_hit(tmp_path):
    """Repeat the gold reply in capitals and with an article; a wrong candidate with an equal score is no hit."""
    turns = [{"history": ["hi"], "candidates": ["A blue one !", "no", "blue one"]},
             {"history": ["hi"], "candidates": ["no", "yes", "blue one"]}]
    split = table_of({"train": [], "valid": [{"utterances": turns}]}, tmp_path)["valid"]
    records = [{"scores": [3.0, 2.0, 1.0], "reply": "A blue one !"}, {"scores": [1.0, 3.0, 3.0], "reply": "yes"}]
    figures = choice_metrics(records, split)
    assert (figures["Hits@1"], figures["MRR"], figures["Accuracy"]) == (0.5, 0.75, 0.5)
    write_report(tmp_path / "report", figures, {"model_checkpoint": "run"}, split, 2, records, None)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["ranks"] == [1, 1] and sorted(turn["rank"] for turn in report["worst"]) == [1, 2]
    assert sum(one["turns"] * one["accuracy"] for one in report["calibration"]) == pytest.approx(1)


def test_turns_without_a_choice_do_not_count(tmp_path, trained):
    corpus = json.loads(shared("cases/one_candidate.json").read_text())
    (tmp_path / "alone.json").write_text(json.dumps(corpus))
    script("train.py", "--dataset_path", "alone.json", "--distractors", "none", "--model_checkpoint", trained,
           "--n_epochs", 0, cwd=tmp_path)
    assert "hits@1: nothing to choose, nll" in script.stderr
    said = script("convai_evaluation.py", "--dataset_path", "alone.json", "--distractors", "none", "--report", "report",
                  "--model_checkpoint", trained, cwd=tmp_path)
    assert said == "FINAL Hits@1: nothing to choose\n" and "hits@k cannot be measured" in script.stderr
    assert "95 % intervals" not in script.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["figures"] == {"Hits@1": None} and "ranks" not in report
    corpus["valid"].append({"utterances": [{"history": ["hi ."], "candidates": ["hi .", "bye ."]},
                                           {"history": ["hi ."], "candidates": ["bye .", "hi ."]}]})
    (tmp_path / "alone.json").write_text(json.dumps(corpus))
    script("train.py", "--dataset_path", "alone.json", "--distractors", "none", "--model_checkpoint", trained,
           "--n_epochs", 0, cwd=tmp_path)
    assert "Validation: hits@1 0.5000" in script.stderr  # one of the two turns with a choice is right
    said = script("convai_evaluation.py", "--dataset_path", "alone.json", "--distractors", "none", "--report", "report",
                  "--model_checkpoint", trained, cwd=tmp_path)
    assert "FINAL Hits@1: 0.5\n" in said


def test_reply_metrics_by_hand(tmp_path):
    corpus = {"train": [], "valid": [{"personality": ["i love cats ."], "utterances": [
        {"history": ["old", "older", "what do you love ?"], "candidates": ["x", "the cats , of course"]},
        {"history": ["old", "older", "what do you love ?", "y", "z"], "candidates": ["x", "cats"]},
        {"history": ["a"], "candidates": ["x", "no"]}]}]}
    table = table_of(corpus, tmp_path)
    records = [{"reply": "I love cats."}, {"reply": "older cats cats"}, {"reply": ""}]
    metrics = reply_metrics(records, table["valid"], max_history=1)
    assert metrics["Stutters"] == 0
    assert metrics["F1"] == pytest.approx((2 * 1 / (3 + 3) + 2 * 1 / (3 + 1) + 0) / 3)
    assert metrics["Accuracy"] == 0
    assert metrics["Words per reply"] == pytest.approx((4 + 3 + 0) / 3)
    assert metrics["Distinct-1"] == pytest.approx(5 / 7)  # the different words are: I love cats . older
    assert metrics["Distinct-2"] == pytest.approx(5 / 5)
    assert metrics["Copied"] == pytest.approx(1 / 3)  # the first reply copies the persona, ignoring case
    records[0], records[2] = {"reply": "cats cats cats . cats"}, {"reply": "well . . ."}
    assert reply_metrics(records, table["valid"], max_history=1)["Stutters"] == pytest.approx(1 / 3)


def test_calibration_by_hand():
    """Use two turns at probability 1/2, one of them right, and two turns at nearly 1, both right."""
    bins = calibration([[0.0, 0.001], [0.001, 0.0], [0.0, 9.0], [-9.0, 3.0]], [True, False, True, True])
    assert [(one["from"], one["turns"], one["accuracy"]) for one in bins] == [(0.5, 2, 0.5), (0.9, 2, 1.0)]
    assert bins[0]["confidence"] == pytest.approx(0.50025, abs=1e-5)
    assert calibration_error(bins) == pytest.approx((0.00025 + 0.00006) / 2, abs=1e-4)


def test_the_report_shows_the_worst_turns_escaped(tmp_path):
    corpus = {"train": [], "valid": [{"personality": ["<b>i</b>"], "utterances": [
        {"history": [f"said {n}"], "candidates": ["<script>alert(1)</script>", f"gold {n}"]} for n in range(30)]}]}
    split = table_of(corpus, tmp_path)["valid"]
    records = [{"scores": [0.0, n - 10.0], "reply": "<i>"} for n in range(30)]
    records[0] |= {"use_of_persona": 1.5, "nearest_sentence": "<b>i</b>"}
    folder = tmp_path / "deep" / "report"
    flags = {"model_checkpoint": "<run>", "top_k": 0, "fp16": ""}
    write_report(folder, {"Hits@1": 19 / 30}, flags, split, 2, records, records)
    page = (folder / "report.html").read_text()
    assert "<dt>top_k</dt><dd>0</dd>" in page and "<dt>fp16" not in page and "among the first candidates" in page
    assert "<script>" not in page and "<b>i" not in page and "<run>" not in page and "&lt;script&gt;" in page
    assert "Below a reply" in page and "1.50: &lt;b&gt;i" in page
    report = json.loads((folder / "report.json").read_text())
    assert [turn["turn"] for turn in report["worst"]] == list(range(20))
    assert report["ranks"] == [19, 11]  # turn 10 is a tie
    assert report["worst"][0]["candidates"][1] == {"text": "gold 0", "score": -10.0, "gold": True}
    assert report["worst"][0]["probability"] == pytest.approx(1 / (1 + math.exp(10)))


def test_intervals_equal_scipys_bootstrap():
    draw = np.random.default_rng(1)
    groups = np.repeat(np.arange(60), draw.integers(2, 9, 60))
    weights = draw.integers(5, 20, len(groups)).astype(float)
    values = weights * (draw.normal(2.5, 0.5, 60)[groups] + draw.normal(0, 0.3, len(groups)))
    low, high = metrics.interval(values, weights, groups, draws=4000)
    totals, counts = np.bincount(groups, values), np.bincount(groups, weights)
    theirs = scipy.stats.bootstrap(
        (totals, counts), lambda one, other, axis: one.sum(axis) / other.sum(axis), paired=True, vectorized=True,
        method="percentile", n_resamples=4000, rng=2).confidence_interval
    assert low == pytest.approx(theirs.low, abs=0.01) and high == pytest.approx(theirs.high, abs=0.01)
    assert low < values.sum() / weights.sum() < high
    alone = metrics.interval(values, weights, np.arange(len(groups)))
    assert high - low > 1.3 * (alone[1] - alone[0])  # turns of one dialog are not independent


# ------------------------------------------------------------------------------------------------------ comparisons


def test_a_difference_is_tested_by_exchanging_whole_dialogs():
    """The probability by enumeration of all exchanges, the interval by drawing dialogs in a loop."""
    draw = np.random.default_rng(3)
    groups = np.repeat(np.arange(9), draw.integers(1, 6, 9))
    weights = draw.integers(1, 9, (2, len(groups))).astype(float)
    values = weights * (draw.normal(1, 0.4, 9)[groups] + draw.normal([[0.25], [0]], 0.2, (2, len(groups))))
    found = metrics.compare(np.stack([values[0], weights[0]]), np.stack([values[1], weights[1]]), groups, True)

    def difference(chosen: list[list[int]]) -> float:
        """``chosen``: for both sides, the model whose dialog is taken, per dialog, and the dialogs."""
        ratios = [sum(values[model, groups == dialog].sum() for model, dialog in side) /
                  sum(weights[model, groups == dialog].sum() for model, dialog in side) for side in chosen]
        return math.exp(ratios[0]) - math.exp(ratios[1])

    real = difference([[(model, dialog) for dialog in range(9)] for model in (0, 1)])
    exchanged = np.array([difference([[(side ^ swap, dialog) for dialog, swap in enumerate(swaps)] for side in (0, 1)])
                          for swaps in product((0, 1), repeat=9)])
    at_least = min((exchanged >= real - 1e-9).mean(), (exchanged <= real + 1e-9).mean())
    assert found["p"] == pytest.approx(min(1, 2 * at_least)) and 0 < found["p"] < 0.3
    assert found["difference"] == pytest.approx(real) == found["first"] - found["second"]
    drawn = [difference([[(model, dialog) for dialog in dialogs] for model in (0, 1)])
             for dialogs in draw.integers(9, size=(3000, 9)).tolist()]
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.05)
    alone = metrics.compare(np.ones((2, 3)), np.ones((2, 3)), [0, 0, 0])
    assert alone["difference"] == 0 and math.isnan(alone["p"]) and math.isnan(alone["low"])


def test_two_models_are_compared_turn_by_turn(tmp_path, trained, small_corpus):
    how = ("--dataset_path", small_corpus, "--dataset_cache", "cache", "--eval_type", "all", "--max_length", 4)
    script("convai_evaluation.py", *how, "--model_checkpoint", trained, "--predictions", "trained.jsonl", cwd=tmp_path)
    script("convai_evaluation.py", *how, "--model_checkpoint", TINY, "--predictions", "random.jsonl", "--compare",
           "trained.jsonl", "--report", "report", cwd=tmp_path)
    assert "Hits@1: " in script.stderr and " in trained.jsonl; difference " in script.stderr
    first, second = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
                     for name in ("random", "trained"))
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    comparison, figures = report["comparison"], report["figures"]
    assert set(comparison["metrics"]) == {"Hits@1", "Token PPL", "Word PPL", "F1"}
    for name, one in comparison["metrics"].items():
        assert one["first"] == pytest.approx(figures[name]) and one["low"] <= one["difference"] <= one["high"]
    perplexity = math.exp(sum(one["nll"] for one in second) / sum(one["tokens"] for one in second))
    assert comparison["metrics"]["Token PPL"]["second"] == pytest.approx(perplexity)

    def gold(record: dict) -> float:
        return math.exp(record["scores"][-1]) / sum(map(math.exp, record["scores"]))

    gaps = [abs(gold(one) - gold(other)) for one, other in zip(first, second, strict=True)]
    turns = comparison["turns"]["hits@1"]
    assert [abs(one["values"][0] - one["values"][1]) for one in turns] == pytest.approx(sorted(gaps)[::-1][:20])
    assert turns[0]["values"] == pytest.approx([gold(first[turns[0]["turn"]]), gold(second[turns[0]["turn"]])])
    for one in comparison["turns"]["f1"]:
        assert one["replies"] == [first[one["turn"]]["reply"], second[one["turn"]]["reply"]]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Compared with trained.jsonl" in page and "Turns that differ most: Probability of the gold reply" in page

    def refusal(lines: list[dict], *more) -> str:
        (tmp_path / "other.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return error_line("convai_evaluation.py", *how, "--model_checkpoint", TINY, "--compare", "other.jsonl", *more,
                          cwd=tmp_path)

    assert "line 2 is not about turn 1 of these data" in refusal([second[0], *second])
    assert f"lacks the hits@1 of some of the {len(first)} turns" in refusal(second[:-1])
    chosen = [{name: one[name] for name in ("context", "gold", "scores", "reply")} for one in second]
    assert "lacks the f1 of some" in refusal(chosen, "--eval_type", "f1")  # the reply is the chosen candidate
