"""Compute attention over packed rows and low-rank layers faster than transformers and PEFT do.

These functions deal with tensors only. Tests compare each of them with the library's own result.
"""

import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners import lora
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def packed_attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
           attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
           **kwargs) -> tuple[torch.Tensor, None]:
    """Compute attention behind the interface of transformers: matrix products for packed rows, torch's SDPA otherwise.

    For packed rows in bfloat16 on CPUs, SDPA's kernel takes two to three times as long as these matrix products,
    mostly in the backward pass with a mask. It also needs a copy of a key head for each query head that shares it.
    ``query`` is (batch, heads, queries, size), ``key`` and ``value`` are (batch, key heads, keys, size); the result is
    (batch, queries, heads, size).
    """
    plain = not any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if attention_mask is None or dropout or query.device.type != "cpu" or dtype != torch.bfloat16 \
            or query.shape[2] == 1 or attention_mask.shape[1] > 1 or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      **kwargs)
    batch, heads, queries, size = query.shape
    key_heads, keys = key.shape[1:3]
    if attention_mask.dtype == torch.bool:
        attention_mask = additive(attention_mask, dtype)
    grouped = (query * (size ** -0.5 if scaling is None else scaling)).to(dtype).reshape(batch, key_heads, -1, size)
    key, value = key.to(dtype), value.to(dtype)
    scores = (grouped @ key.transpose(-1, -2)).view(batch, heads, queries, keys) + attention_mask
    weights = torch.softmax(scores, -1).to(dtype).view(batch, key_heads, -1, keys)
    return (weights @ value).view(batch, heads, queries, size).transpose(1, 2).contiguous(), None


def grouped_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scaling: float,
                      softcap: float | None = None) -> torch.Tensor:
    """Compute attention as matrix products, without a copy of a key head for each query head that shares it.

    ``query`` (rows, heads, tokens, size), ``keys`` (rows, key heads, size, columns), which is the order in which the
    product reads them, ``values`` (rows, key heads, columns, size); ``mask`` (rows or 1, 1, tokens, columns) is added
    to the scores. The result is (rows, heads, tokens, size). With few tokens per row this takes less than half of the
    time of torch's kernel on CPUs.
    """
    rows, heads, tokens, size = query.shape
    grouped = (query * scaling).to(keys.dtype).reshape(rows, keys.shape[1], -1, size)
    scores = (grouped @ keys).view(rows, heads, tokens, -1)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = (scores + mask).softmax(-1).to(values.dtype)  # in float32, as the mask is
    return (weights.view(rows, keys.shape[1], -1, keys.shape[3]) @ values).view(rows, heads, tokens, size)


ATTENTION = "sdpa_or_products"  # the name of `packed_attention` in a model's configuration; it is not saved
AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def usual_attention(name: str, module: nn.Module) -> Callable:
    """Return the attention function that transformers knows as ``name``.

    For "eager", return the function of the model family that ``module`` belongs to.
    """
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def extend_attention_(model: nn.Module, suffix: str, extended: Callable) -> bool:
    """Wrap the model's attention in ``extended``, in place. Return False if the model family does not allow this.

    transformers calls ``extended(name, module, query, …)`` from then on: ``name`` is the name of the attention used so
    far, for `usual_attention`; the other arguments are those of any attention function. The new attention is
    registered under the old name plus ``suffix``; a model that already has this suffix is left unchanged.
    """
    name = model.config._attn_implementation
    if name.endswith(suffix):
        return True
    family: Any = next(known for known in type(model).__mro__ if known.__module__.startswith("transformers."))
    if not family._can_set_attn_implementation():
        return False
    AttentionInterface.register(name + suffix, partial(extended, name))
    AttentionMaskInterface.register(name + suffix, ALL_MASK_ATTENTION_FUNCTIONS[name])
    model.set_attn_implementation(name + suffix)
    return True


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a boolean mask to numbers that are added to the scores: 0 where a query may see a key."""
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)


def candidate_mask(segment_ids: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
    """Return the attention mask of packed rows, (batch, 1, queries, keys): True where a query may see a key.

    ``segment_ids`` (batch, positions) numbers the candidates from 1; the context is segment 0. A token sees the
    earlier tokens of the context and of its own segment. ``visible`` (batch, positions) limits a candidate to the first
    tokens of the context; without it, a candidate sees the whole context. Padding sees the beginning of the context,
    which keeps its softmax finite; no token sees padding.
    """
    length, device = segment_ids.shape[1], segment_ids.device
    before = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    context = key == 0
    if visible is not None:
        context = context & (torch.arange(length, device=device) < visible[:, :, None])
    return (before & (context | (key == query)))[:, None]


class _LowRank(torch.autograd.Function):
    """The function ``x W' + scale (x A') B'`` (Hu et al. 2021) with a frozen W, in few passes over memory.

    Shapes: x (tokens, in), W (out, in), A (rank, in), B (out, rank). The matrix products do both additions.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        reduced = x @ a.T
        out = F.linear(x, weight, bias).addmm_(reduced, b.T, alpha=scale)
        ctx.save_for_backward(x, weight, a, b, reduced)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, gradient):
        x, weight, a, b, reduced = ctx.saved_tensors
        of_reduced = (gradient @ b).mul_(ctx.scale)
        of_x = (gradient @ weight).addmm_(of_reduced, a) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_reduced.T @ x, (gradient.T @ reduced).mul_(ctx.scale), None


class LowRankLinear(lora.Linear):
    """PEFT's low-rank layer, computed by `_LowRank` if it has no dropout or other extras; the result is the same.

    PEFT casts the input twice and makes four more passes over the result. Here, layers with the same input, such as the
    projections to queries, keys and values, share one cast.
    """

    _last_cast: tuple = (lambda: None, None, None)  # the last input (a weak reference), its version, its cast

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        adapter = self.active_adapters[0]
        if self.disable_adapters or self.merged or args or kwargs or self.fan_in_fan_out or self.lora_variant or \
                len(self.active_adapters) > 1 or not isinstance(self.lora_dropout[adapter], nn.Identity):
            return super().forward(x, *args, **kwargs)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        states, version, cast = LowRankLinear._last_cast
        if x.dtype == dtype or not torch.is_grad_enabled():
            cast = x.to(dtype)
        elif states() is not x or version != x._version or cast.dtype != dtype:
            cast = x.to(dtype)
            LowRankLinear._last_cast = weakref.ref(x), x._version, cast
        weights = [None if weight is None else weight.to(dtype) for weight in (
            self.weight, self.bias, self.lora_A[adapter].weight, self.lora_B[adapter].weight)]
        return _LowRank.apply(cast.flatten(0, -2), *weights, self.scaling[adapter]).unflatten(0, x.shape[:-1])
