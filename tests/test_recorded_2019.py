"""Replay everything that the software of 2019 recorded, number for number, through the functions people import."""

from argparse import Namespace

import pytest
import torch

from inputs import Specials, build_context, build_reply, collate, pack_turn
from interact import sample_sequence, top_filtering
from outputs import WordShares
from tokenization import get_tokenizer
from train import build_input_from_segments
from weights import add_special_tokens_, load_model


@pytest.fixture(scope="module")
def tokenizer(run_2019):
    return get_tokenizer(str(run_2019))


@pytest.fixture(scope="module")
def model(run_2019, tokenizer):
    model = load_model(str(run_2019))
    add_special_tokens_(model, tokenizer)
    return model


def ids_of(tokenizer, sentences):
    return [tokenizer.encode(sentence) for sentence in sentences]


def test_tokenize(golden, tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(golden["special_ids"])) == list(golden["special_ids"].values())
    assert len(golden["tokenize"]) == 185
    for case in golden["tokenize"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(case["text"])) == case["ids"]  # functions of 2019


def test_inputs(golden, tokenizer):
    assert len(golden["inputs"]) == 96
    for case in golden["inputs"]:
        built = build_input_from_segments(
            ids_of(tokenizer, case["persona"]), ids_of(tokenizer, case["history"]), tokenizer.encode(case["reply"]),
            tokenizer, lm_labels=case["lm_labels_flag"], with_eos=case["with_eos"],
        )
        assert built == {name: case[name] for name in ("input_ids", "token_type_ids", "mc_token_ids", "lm_labels")}


def test_forward(golden, tokenizer, model):
    special = Specials.of(tokenizer)
    assert len(golden["forward"]) == 6
    for case in golden["forward"]:
        segments = [ids_of(tokenizer, case[name]) for name in ("persona", "history", "candidates")]
        row = pack_turn(*segments, special, max_positions=512)
        with torch.no_grad():
            out = model(**collate([row], special.pad))
        assert out.mc_logits[0].tolist() == pytest.approx(case["mc_logits"], abs=1e-4)
        assert out.mc_loss.item() == pytest.approx(case["mc_loss"], abs=1e-4)
        assert out.lm_loss.item() == pytest.approx(case["lm_loss"], abs=1e-4)
        assert out.tokens.tolist() == [case["gold_tokens_scored"]]
        beaten_by = sum(score >= case["mc_logits"][-1] for score in case["mc_logits"][:-1])
        assert out.gold_rank.tolist() == [1 + beaten_by]


def test_greedy(golden, tokenizer, model):
    assert len(golden["greedy"]) == 6
    for case in golden["greedy"]:
        args = Namespace(no_sample=True, max_length=case["max_length"], min_length=1, temperature=1, top_k=0, top_p=0)
        persona, history = ids_of(tokenizer, case["persona"]), ids_of(tokenizer, case["history"])
        assert sample_sequence(persona, history, tokenizer, model, args) == case["ids"]
        # The reply stays the same if its first words are given.
        assert sample_sequence(persona, history, tokenizer, model, Namespace(**{**vars(args), "max_length": 9}),
                               current_output=case["ids"][:3]) == case["ids"]


def test_word_probability(golden, tokenizer, model):
    """Look words up without a leading space, like --legacy_gpt2_words, because the gpt2 recordings did so."""
    shares, special = WordShares(dict(golden["word_freq"]), tokenizer, after_space=False), Specials.of(tokenizer)
    known = 0
    assert len(golden["word_probability"]) == 16
    for case in golden["word_probability"]:
        context = build_context(ids_of(tokenizer, case["persona"]), ids_of(tokenizer, case["history"]), special)
        reply = build_reply(tokenizer.encode(" ".join(case["so_far"])), special, with_eos=False)
        with torch.no_grad():
            logits = model(torch.tensor([context.ids + reply.ids]),
                           token_type_ids=torch.tensor([context.types + reply.types])).logits[0, -1]
        words = shares.probabilities(logits)
        assert (case["word"] in words) == (case["probability"] is not None)
        assert sum(words.values()) == pytest.approx(case["total_mass"], rel=1e-5)
        if case["probability"] is not None:
            known += 1
            assert words[case["word"]] == pytest.approx(case["probability"], rel=1e-5)
    assert known >= 10


def test_top_filtering(golden):
    assert len(golden["top_filtering"]) == 6
    for case in golden["top_filtering"]:
        threshold = -float("inf") if case["threshold"] is None else case["threshold"]
        logits = torch.tensor([case["logits"], case["logits"][::-1]])  # each row is filtered independently
        kept = top_filtering(logits, case["top_k"], case["top_p"], threshold).isfinite()
        assert kept[0].nonzero().flatten().tolist() == case["kept"]
        assert kept[1].flip(0).nonzero().flatten().tolist() == case["kept"]
