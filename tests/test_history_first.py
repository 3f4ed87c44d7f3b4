"""Test --history_first: the history starts at the same position, whatever the length of the persona."""

import json
import math
from argparse import Namespace

import pytest
import torch
import transformers
from conftest import make_checkpoint, script, the_run
from hypothesis import given
from hypothesis import strategies as st
from run_folder import evaluate, scalars

from inputs import Specials, build_context, collate, fit_context, pack_turn
from interact import fitted_context, generate_replies
from model import GPT2DoubleHeads

SPECIAL = Specials(*range(5))
sentences = st.lists(st.lists(st.integers(5, 40), min_size=1, max_size=9), max_size=5)


@given(persona=sentences, history=sentences.filter(len), candidates=sentences.filter(len), start=st.integers(2, 20))
def test_the_history_starts_at_its_position(persona, history, candidates, start):
    row = pack_turn(persona, history, candidates, SPECIAL, 48, start)
    context = row.segment_ids.count(0)
    first_role = next(n for n, token in enumerate(row.input_ids) if token in (SPECIAL.speaker1, SPECIAL.speaker2))
    assert row.position_ids[first_role] == start
    assert row.position_ids[:context] == list(range(start - first_role, start - first_role + context))
    assert min(row.position_ids) >= 0 and max(row.position_ids) < 48
    kept, _ = fit_context(persona, history, 48 - 2 - max(map(len, candidates)), start)
    assert row.input_ids[:first_role] == [SPECIAL.bos, *(token for sentence in kept for token in sentence)]
    assert kept == persona[:len(kept)]
    if len(kept) < len(persona):  # a sentence is dropped only if it does not fit
        assert 1 + sum(map(len, persona[:len(kept) + 1])) > start


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(4)
    config = transformers.GPT2Config(vocab_size=60, n_positions=96, n_embd=32, n_layer=2, n_head=4, num_labels=1,
                                     initializer_range=0.3, bos_token_id=0, eos_token_id=1, history_start=30)
    return GPT2DoubleHeads(config).eval()


def test_scores_equal_those_of_padded_rows(model):
    persona, history, candidates = [[6, 7, 8], [9, 10]], [[11, 12], [13], [14, 15, 16]], [[20, 21], [22], [23, 24, 25]]
    row = pack_turn(persona, history, candidates, SPECIAL, 96, model.history_start)
    own = transformers.GPT2DoubleHeadsModel(model.config).eval()
    own.load_state_dict(model.state_dict())
    with torch.no_grad():
        out = model(**collate([row], SPECIAL.pad))
        context = build_context(persona, history, SPECIAL, model.history_start)
        for number, reply in enumerate(candidates):
            ids = context.ids + [SPECIAL.speaker1, *reply, SPECIAL.eos]
            types = context.types + [SPECIAL.speaker1] * (len(reply) + 2)
            positions = torch.arange(30 - 6, 30 - 6 + len(ids))[None]  # <bos> and five tokens before the history
            states = own.transformer(torch.tensor([ids]), token_type_ids=torch.tensor([types]), position_ids=positions)
            score = own.multiple_choice_head(states.last_hidden_state[:, None], torch.tensor([[len(ids) - 1]]))
            assert out.mc_logits[0, number].item() == pytest.approx(score.item(), abs=1e-5)


def test_decoding_uses_the_same_positions(model):
    """Compare a batch of unequal personas with one full forward pass per token, without cache or padding."""
    dialogs = [([[6, 7, 8], [9, 10]], [[11, 12]]), ([], [[11, 12]]), ([[5] * 20], [[13], [14], [15, 16]])]
    args = Namespace(no_sample=True, max_length=10, min_length=10, temperature=1.0, top_k=0, top_p=0.0)
    contexts = [fitted_context(model, *dialog, SPECIAL, args.max_length) for dialog in dialogs]
    replies = generate_replies(model, contexts, SPECIAL, args)
    for context, reply in zip(contexts, replies, strict=True):
        ids, types = context.ids + [SPECIAL.speaker1], context.types + [SPECIAL.speaker1]
        for token in reply:
            positions = context.start + torch.arange(len(ids))[None]
            logits = model(torch.tensor([ids]), token_type_ids=torch.tensor([types]), position_ids=positions).logits
            logits[0, -1, list(SPECIAL)] = -math.inf
            assert token == logits[0, -1].argmax().item()
            ids, types = [*ids, token], [*types, SPECIAL.speaker1]


def test_scripts_follow_a_runs_history_start(small_corpus, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "start", n_layer=2, n_embd=64)
    script("train.py", "--history_first", "--dataset_path", small_corpus, "--model_checkpoint", checkpoint,
           "--n_epochs", 1, "--lr", 1e-3, "--gradient_accumulation_steps", 1, cwd=tmp_path)
    run = the_run(tmp_path)
    start = json.loads((run / "config.json").read_text())["history_start"]
    assert start > 10
    curves = scalars(run)
    hits, _ = evaluate("hits@1", run, small_corpus, tmp_path)
    ppl, _ = evaluate("ppl", run, small_corpus, tmp_path)
    assert hits == pytest.approx(curves["validation/hits_1"][-1], abs=1e-3)
    assert ppl == pytest.approx(curves["validation/ppl"][-1], rel=1e-3)
    # Without the setting the same weights evaluate differently, so the scripts do use it.
    config = json.loads((run / "config.json").read_text())
    del config["history_start"]
    (run / "config.json").write_text(json.dumps(config))
    assert evaluate("ppl", run, small_corpus, tmp_path)[0] != pytest.approx(ppl, rel=1e-3)
