"""Test --fp16 with apex's meanings, on the half-precision type of CPUs, bfloat16."""

import copy

import pytest
import torch
from conftest import TINY, make_checkpoint
from torch.nn import functional as F

import devices
import layers
from cli import InputError
from inputs import TurnDataset, collate
from layers import attention_blocks, blocked, candidate_mask, packed_attention
from tokenization import get_tokenizer
from utils import get_dataset
from weights import add_special_tokens_, load_model


@pytest.fixture
def model_and_batch(tmp_path, small_corpus):
    torch.manual_seed(0)
    tokenizer = get_tokenizer(str(TINY))
    model = load_model(str(make_checkpoint(tmp_path / "model", n_layer=1, n_embd=32)))
    add_special_tokens_(model, tokenizer)
    dataset = TurnDataset(get_dataset(tokenizer, str(small_corpus), str(tmp_path / "cache"))["train"], tokenizer, 256)
    return model, collate([dataset[turn] for turn in range(4)], dataset.special.pad)


def losses_and_gradients(network, batch, parameters):
    network.eval()
    out = network(**batch)
    (out.lm_loss + out.mc_loss).backward()
    return out, [parameter.grad for parameter in parameters]


@pytest.mark.parametrize("fp16, weights", [("O0", torch.float32), ("O1", torch.float32), ("O2", torch.float32),
                                           ("O3", torch.bfloat16), ("bf16", torch.float32)])
def test_weights_and_losses_of_each_level(model_and_batch, fp16, weights):
    model, batch = model_and_batch
    with torch.no_grad():
        exact = model(**batch)
    network = devices.prepare(model, "cpu", fp16)
    out, gradients = losses_and_gradients(network, batch, model.parameters())
    assert model.transformer.wte.weight.dtype == weights
    assert model.multiple_choice_head.summary.weight.dtype == torch.float32
    for name in ("lm_loss", "mc_loss"):
        assert getattr(out, name).dtype == torch.float32
        assert getattr(out, name).item() == pytest.approx(getattr(exact, name).item(), rel=0.05)
        assert (getattr(out, name) == getattr(exact, name)) == (fp16 == "O0")
    assert [gradient.dtype for gradient in gradients] == [parameter.dtype for parameter in model.parameters()]


def test_o2_refuses_checkpointed_activations(model_and_batch):
    """They would be computed again without the copies; all other levels train with them as without."""
    model, batch = model_and_batch
    plain = losses_and_gradients(devices.HalfPrecision(model, "cpu", "bf16"), batch, model.parameters())[1]
    model.zero_grad()
    model.activation_checkpointing_enable()
    with pytest.raises(InputError, match="--fp16 O2 cannot compute checkpointed activations"):
        devices.prepare(model, "cpu", "O2")
    again = losses_and_gradients(devices.HalfPrecision(model, "cpu", "bf16"), batch, model.parameters())[1]
    assert all(torch.equal(one, other) for one, other in zip(again, plain, strict=True))


def test_o2_computes_with_rounded_weights(model_and_batch):
    """Compare losses and gradients with a model whose weights are rounded; the master weights stay unchanged."""
    model, batch = model_and_batch
    pure, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    out, gradients = losses_and_gradients(devices.HalfPrecision(model, "cpu", "O2"), batch, model.parameters())
    for name, weight in pure.named_parameters():
        if not name.startswith("multiple_choice_head"):
            weight.data = weight.data.bfloat16()
    expected, halves = losses_and_gradients(pure, batch, pure.parameters())
    assert out.lm_loss == expected.lm_loss and out.mc_loss == expected.mc_loss
    assert all(torch.allclose(gradient, half.float(), rtol=2e-2, atol=1e-3)
               for gradient, half in zip(gradients, halves, strict=True))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_attention_is_as_exact_as_torchs(key_heads, dtype):
    """Compare results and gradients over several blocks of queries, some of whose keys are not next to each other."""
    draw = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, heads, 300, 16, generator=draw) for heads in (4, key_heads, key_heads))
    direction = torch.randn(2, 300, 4, 16, generator=draw)
    mask = candidate_mask(torch.tensor([[0] * 120 + [1] * 40 + [2] * 60 + [3] * 80,
                                        [0] * 180 + [1] * 50 + [2] * 30 + [-1] * 40]))

    def gradients(attention, dtype):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (query, key, value)]
        out = attention(*leaves)
        out.backward(direction.to(dtype))
        return [out.float(), *(leaf.grad.float() for leaf in leaves)]

    def kernel(*states):
        return F.scaled_dot_product_attention(*states, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    exact = gradients(kernel, torch.float32)
    theirs = gradients(kernel, dtype)
    ours = gradients(lambda *states: packed_attention(None, *states, blocked(mask, dtype))[0], dtype)
    for name, right, kernels, products in zip(("out", "query", "key", "value"), exact, theirs, ours, strict=True):
        allowed = 2 * (kernels - right).abs().max() if dtype == torch.bfloat16 else 1e-6 * right.abs().max() + 1e-6
        assert (products - right).abs().max() <= allowed, name
    if dtype == torch.bfloat16:  # a mask without blocks, as decoding has it
        whole = gradients(lambda *states: packed_attention(None, *states, mask)[0], dtype)
        assert all((products - right).abs().max() <= 2 * (kernels - right).abs().max()
                   for right, kernels, products in zip(exact, theirs, whole, strict=True))
    hidden = sum(of_block.stop - of_block.start for of_block, seen in attention_blocks(mask)
                 if not isinstance(seen, slice) or seen.stop < 300)
    assert hidden > 150  # these queries are not multiplied with all keys


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_of_attention_equal_finite_differences(dropout, monkeypatch):
    monkeypatch.setattr(layers, "BLOCK", 4)
    mask = blocked(candidate_mask(torch.tensor([[0] * 4 + [1] * 2 + [2] * 3, [0] * 3 + [1] * 5 + [-1]])), torch.float64)
    draw = torch.Generator().manual_seed(1)
    states = [torch.randn(2, heads, 9, 2, generator=draw, dtype=torch.float64, requires_grad=True)
              for heads in (4, 2, 2)]

    def attention(*states):
        torch.manual_seed(5)  # the same weights are dropped each time
        return packed_attention(None, *states, mask, dropout=dropout)[0]

    assert torch.autograd.gradcheck(attention, states)


def test_dropout_of_attention_weights():
    """With an identity matrix as values, the result is the weights themselves."""
    query, key = torch.randn(2, 1, 2, 200, 8, generator=torch.Generator().manual_seed(2))
    mask = blocked(candidate_mask(torch.tensor([[0] * 50 + [1] * 150])), torch.float32)
    value = torch.eye(200).expand(1, 2, 200, 200)
    whole, dropped = (packed_attention(None, query, key, value, mask, dropout=rate)[0] for rate in (0.0, 0.25))
    kept = dropped != 0
    assert torch.allclose(dropped[kept], whole[kept] / 0.75)
    assert 1 - kept[whole > 0].float().mean() == pytest.approx(0.25, abs=0.01)


def test_dropout():
    layer, states = layers.Dropout(0.1), torch.randn(500, 400, requires_grad=True)
    torch.manual_seed(1)
    first = layer(states)
    first.sum().backward()
    kept = first != 0
    assert torch.allclose(first[kept], states[kept] / 0.9, rtol=1e-4)
    assert torch.allclose(states.grad, kept / 0.9, rtol=1e-4)
    assert kept.float().mean() == pytest.approx(0.9, abs=0.005)
    assert kept.float().mean(0).std() == pytest.approx((0.9 * 0.1 / 500) ** 0.5, rel=0.2)  # columns are independent
    assert not torch.equal(layer(states) != 0, kept)
    torch.manual_seed(1)
    assert torch.equal(layer(states), first)
    assert torch.equal(layer.eval()(states), states)
