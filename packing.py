"""Keep the weights of linear layers in the form in which a CPU multiplies them fastest, for decoding.

Decoding reads all weights for each token, so their size and order decide its speed.
"""

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
    """One of several layers that read the same states and are packed as a whole; alone, it computes all of them."""

    def __init__(self, whole: PackedLinear, rows: slice):
        super().__init__()
        self.whole, self.rows = whole, rows

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.whole(states)[..., self.rows]


def packed(layers: list[nn.Module]) -> PackedLinear:
    """Pack layers that read the same states into one."""
    weights = [layer.weight.T if isinstance(layer, Conv1D) else layer.weight for layer in layers]
    bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
    return PackedLinear(torch.cat(weights), bias)


def can_pack(model: DoubleHeadsModel) -> bool:
    """Return whether the model's linear layers can be packed: in a precision that oneDNN multiplies on this CPU."""
    return model.device.type == "cpu" and torch.backends.mkldnn.is_available() and (
        model.dtype == torch.float32 or model.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.no_grad()
def prepare_to_decode_(model: DoubleHeadsModel, device: str, fp16: str = "") -> DoubleHeadsModel:
    """Move a model to its device, in the precision of ``fp16``, and pack its linear layers on CPUs.

    The model cannot be trained or saved afterwards.
    """
    layers = [layer for layer in getattr(model.base_model, "layers", []) if type(layer).__name__ in LLAMA_LAYERS]
    half = half_dtype(device, fp16)
    if half in (None, torch.bfloat16) and torch.device(device).type == "cpu":
        for layer in layers:
            own, mlp = layer.self_attn, layer.mlp
            _move_scale(layer.input_layernorm, [own.q_proj, own.k_proj, own.v_proj])
            _move_scale(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
    model.to(device, half)
    if not can_pack(model):
        return model
    for own in (layer.self_attn for layer in layers):
        several, done = [own.q_proj, own.k_proj, own.v_proj], 0
        whole = packed(several)
        for name, linear in zip(("q_proj", "k_proj", "v_proj"), several, strict=True):
            setattr(own, name, Part(whole, slice(done, done + linear.out_features)))
            done += linear.out_features
    for parent in list(model.base_model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.Linear, Conv1D, Linear, Transposed):
                setattr(parent, name, packed([child]))
    if type(head := model.get_output_embeddings()) in (nn.Linear, Linear):
        model.set_output_embeddings(packed([head]))
    return model


def _move_scale(norm: nn.Module, linear: list[nn.Module]) -> None:
    """Multiply the weights of a norm into those of the layers that read its result: one rounding instead of three."""
    for layer in linear:
        layer.weight.mul_(norm.weight)
    norm.weight.fill_(1)
