"""Test --fp16 with apex's meanings, on the half-precision type of CPUs, bfloat16."""

import copy

import pytest
import torch
from conftest import TINY, make_checkpoint
from torch.nn import functional as F

import devices
from inputs import TurnDataset, collate
from layers import candidate_mask, packed_attention
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
def test_bfloat16_attention_is_as_exact_as_torchs(key_heads):
    draw = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, heads, 33, 16, generator=draw) for heads in (4, key_heads, key_heads))
    segments = torch.tensor([[0] * 12 + [1] * 9 + [2] * 12, [0] * 20 + [1] * 8 + [-1] * 5])
    mask = candidate_mask(segments)

    def gradients(attention, dtype):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (query, key, value)]
        out = attention(*leaves)
        (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        return [out.float(), *(leaf.grad.float() for leaf in leaves)]

    def kernel(*states):
        return F.scaled_dot_product_attention(*states, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    exact = gradients(kernel, torch.float32)
    theirs = gradients(kernel, torch.bfloat16)
    ours = gradients(lambda *states: packed_attention(None, *states, mask)[0], torch.bfloat16)
    for name, right, kernels, products in zip(("out", "query", "key", "value"), exact, theirs, ours, strict=True):
        scale = right.abs().max()
        assert (products - right).abs().max() <= 2 * (kernels - right).abs().max() + 0.004 * scale, name
