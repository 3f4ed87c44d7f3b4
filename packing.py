"""Keep the weights of linear layers in the form in which decoding multiplies them fastest.

Decoding reads all weights for each token. On CPUs, their size and order decide its speed; on GPUs, the number of
operations does, so layers that read the same states are joined.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layers import Linear, Transposed
from model import DoubleHeadsModel, half_dtype

LLAMA_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")  # llama.py computes these


class PackedLinear(nn.Module):
    """A linear layer without gradients, in bfloat16 or float32, whose weights lie as oneDNN reads them.

    For one token this takes half of the time of ``nn.Linear``, and for a few in float32 a third, where torch uses MKL.
    Sums are in float32 in both, in another order.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.weights = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self.out_features = weight.shape[0]

    def forward(self, states: torch.Tensor, activation: str = "none") -> torch.Tensor:
        """Compute the layer and then ``activation``: "none" or "swish"."""
        return torch.ops.mkldnn._linear_pointwise(states, self.weights, self.bias, activation, [], "")

    def combine(self, states: torch.Tensor, other: torch.Tensor, how: str) -> torch.Tensor:
        """Compute the layer; add ``other`` to the result ("add"), or multiply by it ("mul")."""
        return torch.ops.mkldnn._linear_pointwise.binary(states, other, self.weights, self.bias, how)


class Part(nn.Module):
    """One of several layers that read the same states and are joined to a whole; alone, it computes all of them."""

    def __init__(self, whole: nn.Module, rows: slice):
        super().__init__()
        self.whole, self.rows = whole, rows

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.whole(states)[..., self.rows]


def packed(layers: list[nn.Module]) -> PackedLinear:
    """Pack layers that read the same states into one."""
    return PackedLinear(*_weights(layers))


def joined(layers: list[nn.Module]) -> nn.Linear:
    """Join layers that read the same states into one, without gradients."""
    weight, bias = _weights(layers)
    whole = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    whole.weight = nn.Parameter(weight, requires_grad=False)
    whole.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return whole


def _weights(layers: list[nn.Module]) -> tuple[torch.Tensor, torch.Tensor | None]:
    weights = [layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach() for layer in layers]
    bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
    return torch.cat(weights), bias


def _replace_(parent: nn.Module, names: tuple[str, ...], how: Callable) -> None:
    """Put a `Part` in the place of each layer called ``names``; ``how`` makes a single layer of all of them."""
    several, done = [getattr(parent, name) for name in names], 0
    whole = how(several)
    for name, layer in zip(names, several, strict=True):
        setattr(parent, name, Part(whole, slice(done, done + layer.out_features)))
        done += layer.out_features


def can_pack(model: DoubleHeadsModel) -> bool:
    """Return whether the model's linear layers can be packed: in a precision that oneDNN multiplies on this CPU."""
    return model.device.type == "cpu" and torch.backends.mkldnn.is_available() and (
        model.dtype == torch.float32 or model.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.no_grad()
def prepare_to_decode_(model: DoubleHeadsModel, device: str, fp16: str = "") -> DoubleHeadsModel:
    """Move a model to its device, in the precision of ``fp16``, and pack or join its linear layers.

    The model cannot be trained or saved afterwards.
    """
    for layer in _llama_layers(model):
        own, mlp = layer.self_attn, layer.mlp
        _move_scale(layer.input_layernorm, [own.q_proj, own.k_proj, own.v_proj])
        _move_scale(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
    model.to(device, half_dtype(device, fp16))
    if model.device.type != "cpu":
        join_(model)
    elif can_pack(model):
        pack_(model)
    return model


def join_(model: DoubleHeadsModel) -> None:
    """Join the layers of Llama's kind that read the same states, in place."""
    for layer in _llama_layers(model):
        _replace_(layer.self_attn, ("q_proj", "k_proj", "v_proj"), joined)
        _replace_(layer.mlp, ("gate_proj", "up_proj"), joined)


def pack_(model: DoubleHeadsModel) -> None:
    """Pack all linear layers in place, those of Llama's queries, keys and values as a whole."""
    for layer in _llama_layers(model):
        _replace_(layer.self_attn, ("q_proj", "k_proj", "v_proj"), packed)
    for parent in list(model.base_model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.Linear, Conv1D, Linear, Transposed):
                setattr(parent, name, packed([child]))
    if type(head := model.get_output_embeddings()) in (nn.Linear, Linear):
        model.set_output_embeddings(packed([head]))


def _llama_layers(model: DoubleHeadsModel) -> list[nn.Module]:
    return [layer for layer in getattr(model.base_model, "layers", []) if type(layer).__name__ in LLAMA_LAYERS]


def _move_scale(norm: nn.Module, linear: list[nn.Module]) -> None:
    """Multiply the weights of a norm into those of the layers that read its result: one rounding instead of three."""
    for layer in linear:
        layer.weight.mul_(norm.weight)
    norm.weight.fill_(1)
