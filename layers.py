"""Layers of the network that transformers and PEFT compute otherwise: attention over packed rows, low-rank updates.

Knows tensors alone. Each has a test that compares it with the library's own computation.
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
    """Attention in the form that transformers calls it: torch's SDPA, but for packed rows in bfloat16 on CPUs.

    There SDPA's kernel takes two to three times as long as these matrix products, mostly for its backward pass over a
    mask; and query heads that share a key head need no copies of it. ``query`` is (batch, heads, queries, size),
    ``key`` and ``value`` (batch, key heads, keys, size); the result is (batch, queries, heads, size).
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


ATTENTION = "sdpa_or_products"  # the name of `packed_attention` in a model's configuration; it is not saved
AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def usual_attention(name: str, module: nn.Module) -> Callable:
    """The attention of that ``name``; of "eager", that of the family which ``module`` belongs to."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def extend_attention_(model: nn.Module, suffix: str, extended: Callable) -> bool:
    """Let ``extended`` compute the model's attention, in place, around what has computed it so far.

    transformers knows the result by the old name and ``suffix``; a model that has it already stays as it is.
    ``extended(name, module, query, …)`` gets the old name, for `usual_attention`, and what transformers hands to an
    attention. Returns False where the family's code has an attention of its own.
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
    """A mask of booleans as numbers to add to the scores: 0 where a query may see a key."""
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)


def candidate_mask(segment_ids: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
    """(batch, positions) segments → (batch, 1, positions, positions), True where a query (row) may see a key.

    A token sees what stands before it in the context (segment 0) and in its own segment. Of the context, a candidate
    sees the first ``visible`` (batch, positions) tokens; without ``visible``, all of it. Padding sees the beginning of
    the context, which keeps its softmax finite; nothing sees padding.
    """
    length, device = segment_ids.shape[1], segment_ids.device
    before = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    context = key == 0
    if visible is not None:
        context = context & (torch.arange(length, device=device) < visible[:, :, None])
    return (before & (context | (key == query)))[:, None]


class _LowRank(torch.autograd.Function):
    """``x W' + scale (x A') B'`` (Hu et al. 2021) with W frozen, in as few passes over the states as there can be.

    x (tokens, in), W (out, in), A (rank, in), B (out, rank). Both sums are added up within the matrix products.
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
    """PEFT's layer, computed by `_LowRank` wherever the layer is plain: the same function with fewer passes.

    PEFT casts the states twice and passes over the result four times more. Layers that read the same states, as those
    of queries, keys and values, share one cast of them.
    """

    _last_cast: tuple = (lambda: None, None, None)  # states (a weak reference), their version, their cast

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
