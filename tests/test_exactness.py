"""Compare the packed computation with transformers' own double-heads model on padded tensors."""

import copy
import math
import shutil

import pytest
import torch
import transformers
from conftest import TINY, TINY_TOKENS, templates
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import devices
import layers
import utils
from cli import InputError
from decoding import nucleus_at_once
from inputs import Specials, TurnDataset, build_input_from_segments, collate, get_loader, pack_turn
from interact import top_filtering
from layers import candidate_mask
from tokenization import get_tokenizer
from train import parse_args
from weights import add_special_tokens_, load_model, save_model


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache") / "c")
    return utils.get_dataset(get_tokenizer(str(TINY)), str(templates()), cache)


@pytest.fixture(scope="module", params=["openai-gpt", "gpt2"])
def pair(request, tmp_path_factory):
    """Return our model with weights far from zero, and transformers' model loaded from its run folder."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    if family == "openai-gpt":
        config = transformers.OpenAIGPTConfig(vocab_size=2005, n_positions=256, n_embd=48, n_layer=3, n_head=4,
                                              initializer_range=0.15)
    else:
        config = transformers.GPT2Config(vocab_size=2005, n_positions=256, n_embd=48, n_layer=3, n_head=4,
                                         initializer_range=0.15)
    config.save_pretrained(folder)
    torch.manual_seed(5)
    ours = load_model(str(folder))
    for parameter in ours.parameters():  # also biases and norms: their initial values hide mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_model(ours, folder)
    own = {"openai-gpt": transformers.OpenAIGPTDoubleHeadsModel, "gpt2": transformers.GPT2DoubleHeadsModel}[family]
    return ours, own.from_pretrained(folder).eval()


def textbook(model, tokenizer, turns, pad):
    """Compute both losses and the scores as in textbooks: every candidate a full padded row, with all logits."""
    rows = [[build_input_from_segments(persona, history, reply, tokenizer, lm_labels=number == len(candidates) - 1)
             for number, reply in enumerate(candidates)] for persona, history, candidates in turns]
    width = max(len(row["input_ids"]) for turn in rows for row in turn)

    def padded(name, fill):
        return torch.tensor([[row[name] + [fill] * (width - len(row[name])) for row in turn] for turn in rows])

    last = torch.tensor([[row["mc_token_ids"] for row in turn] for turn in rows])
    out = model(padded("input_ids", pad), token_type_ids=padded("token_type_ids", pad), mc_token_ids=last)
    labels = padded("lm_labels", -100)
    lm_loss = F.cross_entropy(out.logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten())
    gold = torch.full((len(turns),), last.shape[1] - 1)
    return lm_loss, F.cross_entropy(out.mc_logits, gold), out.mc_logits


@pytest.mark.parametrize("candidates", [1, 2, 20])
def test_losses_scores_and_every_gradient(pair, table, candidates):
    ours, own = pair
    tokenizer = get_tokenizer(str(TINY))
    dataset = TurnDataset(table["valid"], tokenizer, 256, num_candidates=candidates, max_history=2)
    picked = [0, 3, 57, 100, 221]
    batch = collate([dataset[turn] for turn in picked], dataset.special.pad)
    turns = [(*dataset.context(turn), table["valid"].token_ids("candidates", turn)[-candidates:]) for turn in picked]

    ours.zero_grad()
    out = ours(**batch)
    (2 * out.lm_loss + out.mc_loss).backward()
    own.zero_grad()
    lm_loss, mc_loss, scores = textbook(own, tokenizer, turns, dataset.special.pad)
    (2 * lm_loss + mc_loss).backward()

    assert out.lm_loss.item() == pytest.approx(lm_loss.item(), abs=1e-5)
    assert out.mc_loss.item() == pytest.approx(mc_loss.item(), abs=1e-5)
    torch.testing.assert_close(out.mc_logits, scores, atol=1e-5, rtol=0)
    renamed = {"wte": "tokens_embed", "wpe": "positions_embed"} if ours.renamed else {}
    gradients = {".".join(renamed.get(part, part) for part in name.split(".")): parameter.grad
                 for name, parameter in ours.named_parameters()}
    checked = 0
    for name, parameter in own.named_parameters():
        if parameter.grad is None:  # a single candidate gives the choice head no gradient
            assert gradients[name] is None or not gradients[name].any()
            continue
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
        checked += 1
    assert checked == len(gradients)


def test_totals_add_up_over_turns(pair, table):
    """Add up nll and tokens per turn, and compare each turn alone with the same turn in a batch."""
    model, _ = pair
    dataset = TurnDataset(table["valid"], get_tokenizer(str(TINY)), 256)
    rows = [dataset[turn] for turn in (1, 8, 90)]
    with torch.no_grad():
        together = model(**collate(rows, dataset.special.pad))
        alone = [model(**collate([row], dataset.special.pad)) for row in rows]
    assert together.lm_loss.item() == pytest.approx((together.nll.sum() / together.tokens.sum()).item(), abs=1e-6)
    for index, out in enumerate(alone):
        assert out.nll.item() == pytest.approx(together.nll[index].item(), abs=2e-4)
        torch.testing.assert_close(out.mc_logits[0], together.mc_logits[index], atol=1e-5, rtol=0)


def test_filled_up_batches_give_the_same_losses(pair, table):
    """Compare batches as GPUs get them, with positions and gold places filled up, with batches without filling."""
    model, _ = pair
    dataset = TurnDataset(table["valid"], get_tokenizer(str(TINY)), 256, num_candidates=3)
    for turns in ([0, 3, 57], [4]):
        results = []
        for multiple in (1, 8):
            batch = collate([dataset[turn] for turn in turns], dataset.special.pad, multiple)
            model.zero_grad()
            out = model(**batch)
            (out.lm_loss + out.mc_loss).backward()
            results.append((out.lm_loss, out.nll, out.tokens, out.mc_logits, model.transformer.wte.weight.grad.clone()))
        assert batch["input_ids"].shape[1] % 8 == 0 and len(batch["gold_places"]) % 256 == 0
        torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("out", [16, 21])
def test_an_aligned_product_is_the_plain_one(out):
    torch.manual_seed(0)
    states, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(out, 8, requires_grad=True)
    results = []
    for product in (layers.aligned_product, F.linear):
        logits = product(states, weight)
        results.append((logits, *torch.autograd.grad(logits.sin().sum(), (states, weight))))
    torch.testing.assert_close(*results)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_the_compiled_network_computes_the_same(pair, table):
    """Compare losses, scores and a gradient with --compile on two batches of different shape."""
    model, _ = pair
    if not model.renamed:
        pytest.skip("compiling takes half a minute, so one family is enough")
    compiled = copy.deepcopy(model)
    devices.compile_(compiled)
    dataset = TurnDataset(table["valid"], get_tokenizer(str(TINY)), 256, num_candidates=3)
    for turns in ([0, 3, 57], [100, 221]):
        batch = collate([dataset[turn] for turn in turns], dataset.special.pad)
        gradients = []
        for one in (model, compiled):
            one.zero_grad()
            out = one(**batch)
            (out.lm_loss + out.mc_loss).backward()
            gradients.append((out.lm_loss, out.mc_logits, one.transformer.wpe.weight.grad))
        torch.testing.assert_close(gradients[1], gradients[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999, 1.0])
def test_the_nucleus_by_definition(spread, top_p):
    """Find the smallest set of likeliest tokens whose probability exceeds top_p, one row and one token at a time."""
    torch.manual_seed(int(10 * spread))
    logits = (spread * torch.randn(3, 5000)).double()
    filtered = top_filtering(logits, top_p=top_p)
    assert torch.equal(nucleus_at_once(logits.softmax(-1), top_p), filtered.isfinite())  # as on GPUs
    for row, out in zip(logits, filtered, strict=True):
        total, nucleus, probabilities = 0.0, set(), row.softmax(-1)
        for token in row.argsort(descending=True).tolist():
            if total > top_p:
                break
            nucleus.add(token)
            total += probabilities[token].item()
        assert set(out.isfinite().nonzero().flatten().tolist()) == nucleus
        assert torch.equal(out[out.isfinite()], row[out.isfinite()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_keep_the_earliest_tokens(dtype):
    logits = torch.tensor([[0.0] * 8, [2.0, -1.0, 2.0, 2.0, -1.0, 2.0, -9.0, 2.0]], dtype=dtype)
    for kept in (top_filtering(logits, top_p=0.55).isfinite(), nucleus_at_once(logits.softmax(-1), 0.55)):
        assert [row.nonzero().flatten().tolist() for row in kept] == [[0, 1, 2, 3, 4], [0, 2, 3]]


def test_unequal_numbers_of_candidates(pair):
    """Score a turn beside one with more candidates: its scores and the rank of the gold reply stay the same."""
    model, _ = pair
    special = Specials(2000, 2001, 2003, 2004, 2002)
    few = pack_turn([[5, 6]], [[7, 8]], [[9], [10, 11]], special, 256)
    many = pack_turn([[5]], [[12]], [[9], [13], [14], [15]], special, 256)
    with torch.no_grad():
        both, alone = model(**collate([few, many], special.pad)), model(**collate([few], special.pad))
    torch.testing.assert_close(both.mc_logits[0, :2], alone.mc_logits[0], atol=1e-5, rtol=0)
    assert both.mc_logits[0, 2:].eq(-math.inf).all()
    assert both.gold_rank[0] == alone.gold_rank[0]


def test_a_repeated_gold_reply_is_a_hit(pair):
    model, _ = pair
    special = Specials(2000, 2001, 2003, 2004, 2002)
    row = pack_turn([[5, 6]], [[7, 8]], [[9, 10], [9, 10]], special, 256)  # the distractor is the gold reply
    with torch.no_grad():
        out = model(**collate([row], special.pad))
        assert out.gold_rank.tolist() == [1]
        other = pack_turn([[5, 6]], [[7, 8]], [[9, 11], [9, 10]], special, 256)
        model = copy.deepcopy(model)
        model.multiple_choice_head.summary.weight.data *= 0  # every candidate has the same score
        assert model(**collate([other], special.pad)).gold_rank.tolist() == [2]


def test_candidate_mask_by_hand():
    """Check the mask of a context of two tokens, candidates of one and two tokens, and one padding token."""
    mask = candidate_mask(torch.tensor([[0, 0, 1, 2, 2, -1]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 1],  # no other token sees padding, so what it sees does not matter
    ]


def test_batches_hold_every_turn_once_with_little_padding(table):
    dataset = TurnDataset(table["train"], get_tokenizer(str(TINY)), 256, num_candidates=2, permutations=2)
    lengths, too_long = dataset.lengths()
    assert too_long == 0
    assert [len(dataset[index].input_ids) for index in range(0, len(dataset), 37)] == lengths[::37].tolist()
    loader = get_loader(dataset, lengths, batch_size=7, seed=3)
    epochs = []
    for epoch in (1, 2, 1):
        loader.batch_sampler.set_epoch(epoch)
        epochs.append([batch.tolist() for batch in loader.batch_sampler])
        assert sorted(sum(epochs[-1], [])) == list(range(len(dataset)))
    assert epochs[0] == epochs[2] != epochs[1]
    filled = sum(lengths) / sum(len(batch) * max(lengths[batch]) for batch in epochs[0])
    assert filled > 0.9


def test_rotations_and_candidates(table):
    tokenizer = get_tokenizer(str(TINY))
    dataset = TurnDataset(table["train"], tokenizer, 256, num_candidates=2, max_history=1, permutations=3)
    turn, turns = 4, table["train"].num_turns
    persona, history = dataset.context(turn)
    assert dataset.context(turn, rotation=1)[0] == persona[-1:] + persona[:-1]
    assert dataset.context(turn, rotation=2)[0] == persona[-2:] + persona[:-2]
    assert len(history) == min(3, len(table["train"].texts("history", turn)))
    row = dataset[turn + turns]
    candidates = table["train"].token_ids("candidates", turn)[-2:]
    assert row == pack_turn(persona[-1:] + persona[:-1], history, candidates, dataset.special, 256)


@pytest.mark.parametrize("positions", [40, 60, 90])
def test_long_turns_lose_context_but_no_reply(table, positions):
    tokenizer = get_tokenizer(str(TINY))
    whole = TurnDataset(table["valid"], tokenizer, 256, max_history=5)
    short = TurnDataset(table["valid"], tokenizer, positions, max_history=5)
    cut = 0
    for turn in range(len(short)):
        row, full = short[turn], whole[turn]
        assert max(row.position_ids) < positions
        assert [token for token in row.labels if token != -100] == [token for token in full.labels if token != -100]
        context, full_context = row.segment_ids.count(0), full.segment_ids.count(0)
        assert row.input_ids[context:] == full.input_ids[full_context:]  # all candidates are complete
        cut += context < full_context
    assert cut == short.lengths()[1] > 0


def test_a_vocabulary_of_another_tokenizer_is_refused(tmp_path):
    transformers.OpenAIGPTConfig(vocab_size=777, n_embd=16, n_layer=1, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"777 tokens and its tokenizer {TINY_TOKENS + 5:,}"):
        add_special_tokens_(load_model(str(tmp_path)), get_tokenizer(str(TINY)))


def test_defaults_are_those_of_2019(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    args = parse_args()
    published = dict(dataset_path="", dataset_cache="./dataset_cache", model_checkpoint="openai-gpt", num_candidates=2,
                     max_history=2, train_batch_size=4, valid_batch_size=4, gradient_accumulation_steps=8, lr=6.25e-5,
                     lm_coef=1.0, mc_coef=1.0, max_norm=1.0, n_epochs=3, personality_permutations=1,
                     eval_before_start=False, fp16="", local_rank=-1)
    assert {name: getattr(args, name) for name in published} == published


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 12), (3, 5, 12), (2, 1, 4, 12), (1, 12)])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_linear_layers_with_onednn_have_torchs_values_and_gradients(kind, shape, bias, monkeypatch):
    monkeypatch.setattr(layers, "ONEDNN", torch.backends.mkldnn.is_available())
    torch.manual_seed(1)
    plain = nn.Linear(12, 9, bias=bias) if kind == "linear" else Conv1D(9, 12)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_()
    ours = copy.deepcopy(plain)
    layers.quicken_(ours)
    assert type(ours) is not type(plain)
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    outputs = [layer(states) for layer, states in zip((plain, ours), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0])
    weights = torch.randn_like(outputs[0])
    for out in outputs:
        (out * weights).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for mine, own in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, own.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(inputs[0]), plain(inputs[0])) and ours(inputs[0]).dtype == torch.bfloat16
