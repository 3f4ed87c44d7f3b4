"""Compute attention over packed rows, dropout, linear and low-rank layers faster than the libraries do.

These functions deal with tensors only. Tests compare each of them with the library's own result.
"""

import math
import os
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners import lora
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

# On CPUs, oneDNN keeps compiled code for each shape of matrices, in two caches of 1,024 pieces each, which batches and
# contexts of ever new lengths fill with hundreds of megabytes. A pass needs some twenty pieces. oneDNN reads the bounds
# when it multiplies the first matrices.
for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(cache, "64")

BLOCK = 128  # queries that are multiplied with keys at once


def attention_blocks(mask: torch.Tensor) -> list[tuple[slice, slice | torch.Tensor]]:
    """Divide the queries of a boolean mask (batch, 1, queries, keys) into blocks; return each with the keys it sees.

    The keys that no query of a block sees in any row of the batch need no computation. In packed rows these are later
    tokens and most other candidates.
    """
    seen, blocks = mask[:, 0].any(0), []
    for first in range(0, len(seen), BLOCK):
        keys = seen[first:first + BLOCK].any(0).nonzero()[:, 0]
        stop = int(keys[-1]) + 1
        blocks.append((slice(first, min(first + BLOCK, len(seen))), slice(0, stop) if len(keys) == stop else keys))
    return blocks


def blocked(mask: torch.Tensor | dict, dtype: torch.dtype) -> torch.Tensor | dict:
    """Convert boolean masks for `packed_attention`: numbers to add to the scores, which carry `attention_blocks`."""
    if isinstance(mask, dict):
        return {kind: blocked(one, dtype) for kind, one in mask.items()}
    numbers = additive(mask, dtype)
    numbers.blocks = attention_blocks(mask)
    return numbers


class _Attention(torch.autograd.Function):
    """Attention in matrix products, block by block, with dropout of the weights.

    Shapes: queries (batch · key heads, queries · group, size), with the query heads of a group side by side and scaled;
    keys and values (batch · key heads, keys, size); the result is like the queries, with the values' size. ``mask`` is
    from `blocked`.
    """

    @staticmethod
    def forward(ctx, queries, keys, values, mask, dropout):
        batch, heads = len(mask), len(queries) // len(mask)
        group = queries.shape[1] // mask.shape[2]
        out, saved = queries.new_empty(*queries.shape[:2], values.shape[2]), []
        for of_block, seen in mask.blocks:
            rows = slice(of_block.start * group, of_block.stop * group)
            scores = queries[:, rows] @ keys[:, seen].transpose(1, 2)
            scores.view(batch, heads, -1, group, scores.shape[2]).add_(mask[:, :, of_block, None, seen])
            weights = torch.softmax(scores, -1)
            kept = draw_kept(weights.shape, dropout) if dropout else None
            out[:, rows] = drop(weights, kept, dropout) @ values[:, seen]
            saved += [weights, kept]
        ctx.save_for_backward(queries, keys, values, *saved)
        ctx.blocks, ctx.group, ctx.dropout = mask.blocks, group, dropout
        return out

    @staticmethod
    def backward(ctx, gradient):
        queries, keys, values, *saved = ctx.saved_tensors
        of_queries = torch.empty_like(queries)
        exact = torch.promote_types(keys.dtype, torch.float32)  # for sums over blocks
        of_keys, of_values = (torch.zeros_like(states, dtype=exact) for states in (keys, values))
        for number, (of_block, seen) in enumerate(ctx.blocks):
            rows, (weights, kept) = slice(of_block.start * ctx.group, of_block.stop * ctx.group), saved[2 * number:][:2]
            of_out = gradient[:, rows]
            of_values[:, seen] += drop(weights, kept, ctx.dropout).transpose(1, 2) @ of_out
            of_weights = drop(of_out @ values[:, seen].transpose(1, 2), kept, ctx.dropout)
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_queries[:, rows] = of_scores @ keys[:, seen]
            of_keys[:, seen] += of_scores.transpose(1, 2) @ queries[:, rows]
        return of_queries, of_keys.to(keys.dtype), of_values.to(values.dtype), None, None


def packed_attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
           attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
           **kwargs) -> tuple[torch.Tensor, None]:
    """Compute attention behind the interface of transformers: `_Attention` on CPUs, torch's SDPA elsewhere.

    SDPA's kernel for CPUs computes what the mask hides, takes two to three times as long as matrix products in
    bfloat16, mostly in the backward pass, and needs a copy of a key head for each query head that shares it. A mask
    that is not from `blocked` is one block, and only in bfloat16. ``query`` is (batch, heads, queries, size), ``key``
    and ``value`` are (batch, key heads, keys, size); the result is (batch, queries, heads, size).
    """
    batch, heads, queries, size = query.shape
    plain = not any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    whole = not hasattr(attention_mask, "blocks")
    drawn = dropout and torch.compiler.is_compiling()  # numpy's draws cannot be compiled
    if not plain or drawn or whole and (attention_mask is None or dropout or query.device.type != "cpu" or queries == 1
                               or dtype != torch.bfloat16 or attention_mask.shape[1] > 1):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      **kwargs)
    if whole:
        numbers = additive(attention_mask, dtype) if attention_mask.dtype == torch.bool else attention_mask
        attention_mask = numbers.expand(batch, -1, -1, -1)
        attention_mask.blocks = [(slice(0, queries), slice(0, key.shape[2]))]
    key_heads = key.shape[1]
    # (batch, heads, queries, size) → (batch, key heads, queries, query heads per key head, size)
    grouped = (query * (size ** -0.5 if scaling is None else scaling)).to(dtype)
    grouped = grouped.unflatten(1, (key_heads, -1)).transpose(2, 3).reshape(batch * key_heads, -1, size)
    with torch.autocast("cpu", enabled=False):  # some of its operations would compute in float32
        out = _Attention.apply(grouped, *(states.to(dtype).flatten(0, 1) for states in (key, value)), attention_mask,
                               dropout)
    return out.view(batch, key_heads, queries, -1, size).transpose(1, 2).reshape(batch, queries, heads, -1), None


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
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


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


def _prefers_onednn() -> bool:
    """Return whether oneDNN multiplies float32 faster than MKL, which runs at half speed on AMD's processors."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text() and torch.backends.mkldnn.is_available()
    except OSError:
        return False


ONEDNN = _prefers_onednn()


def product(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute ``F.linear`` of (tokens, in) and (out, in), without gradients."""
    if ONEDNN and states.dtype == weight.dtype == torch.float32 and states.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return F.linear(states, weight, bias)


class _Linear(torch.autograd.Function):
    """A linear layer whose three products are computed by `product`. Shapes: (tokens, in), (out, in), (out,)."""

    @staticmethod
    def forward(ctx, states, weight, bias):
        ctx.save_for_backward(states, weight)
        return product(states, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        states, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return (product(gradient, weight.T) if needed[0] else None,
                product(gradient.T, states.T) if needed[1] else None, gradient.sum(0) if needed[2] else None)


def _with_onednn(layer: nn.Module, states: torch.Tensor) -> bool:
    """Return whether `_Linear` should compute a layer: in plain float32 on a CPU."""
    plain = not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    return ONEDNN and plain and states.dim() > 1 and states.numel() > 0 and states.device.type == "cpu" \
        and states.dtype == layer.weight.dtype == torch.float32


def aligned_product(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute ``F.linear`` of (…, in) and (out, in) with rows of zeros that make ``out`` a multiple of 8.

    Without them, GPUs use slower kernels. GPT-1 has 40,483 tokens with the control tokens, which is an odd number.
    """
    if torch.is_autocast_enabled(states.device.type):
        weight = weight.to(torch.get_autocast_dtype(states.device.type))  # before the copy
    return F.linear(states, F.pad(weight, (0, 0, 0, -len(weight) % 8)))[..., :len(weight)]


class Linear(nn.Linear):
    """Compute torch's linear layer with quicker products: in float32 on AMD's processors, of odd sizes on GPUs."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if states.is_cuda and self.bias is None and len(self.weight) % 8:
            return aligned_product(states, self.weight)
        if not _with_onednn(self, states):
            return super().forward(states)
        return _Linear.apply(states.flatten(0, -2), self.weight, self.bias).unflatten(0, states.shape[:-1])


class Transposed(Conv1D):
    """Do the same for the linear layers of GPT-1 and GPT-2, whose weights are (in, out)."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if not _with_onednn(self, states):
            return super().forward(states)
        return _Linear.apply(states.flatten(0, -2), self.weight.T, self.bias).unflatten(0, states.shape[:-1])


class _LowRank(torch.autograd.Function):
    """The function ``x W' + scale (x A') B'`` (Hu et al. 2021) with a frozen W, in few passes over memory.

    Shapes: x (tokens, in), W (out, in), A (rank, in), B (out, rank). The matrix products do both additions.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        reduced = x @ a.T
        out = product(x, weight, bias).addmm_(reduced, b.T, alpha=scale)
        ctx.save_for_backward(x, weight, a, b, reduced)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, gradient):
        x, weight, a, b, reduced = ctx.saved_tensors
        of_reduced = (gradient @ b).mul_(ctx.scale)
        of_x = product(gradient, weight.T).addmm_(of_reduced, a) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_reduced.T @ x, (gradient.T @ reduced).mul_(ctx.scale), None


def draw_kept(shape: torch.Size, rate: float) -> torch.Tensor:
    """Draw what dropout of a ``rate`` keeps on a CPU: a boolean tensor.

    torch takes 5 ns per element for this, because it draws one number after the other with a Mersenne twister. Here,
    torch's generator draws a seed, and 16 bits of numpy's SFC64 decide about an element: 0.3 ns. The rate is therefore
    a multiple of 1 / 65536, see `drop`.
    """
    count = math.prod(shape)
    seed = int(torch.randint(2 ** 62, ()))
    bits = torch.from_numpy(np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.int16))[:count].view(shape)
    return bits >= _threshold(rate) - 2 ** 15


def _threshold(rate: float) -> int:
    return round(rate * 2 ** 16)


def drop(states: torch.Tensor, kept: torch.Tensor | None, rate: float) -> torch.Tensor:
    """Set what is not ``kept`` to 0, and scale the rest, so that the mean stays the same; None keeps everything."""
    return states if kept is None else (states * kept).mul_(1 / (1 - _threshold(rate) / 2 ** 16))


class _Dropout(torch.autograd.Function):
    """Dropout with the masks of `draw_kept`."""

    @staticmethod
    def forward(ctx, states, rate):
        kept = draw_kept(states.shape, rate)
        ctx.save_for_backward(kept)
        ctx.rate = rate
        return drop(states, kept, rate)

    @staticmethod
    def backward(ctx, gradient):
        return drop(gradient, ctx.saved_tensors[0], ctx.rate), None


class Dropout(nn.Dropout):
    """torch's dropout with a quicker draw on CPUs."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if self.training and 0 < self.p < 1 and states.device.type == "cpu" and not torch.compiler.is_compiling():
            return _Dropout.apply(states, self.p)
        return super().forward(states)


QUICKER = {nn.Dropout: Dropout, nn.Linear: Linear, Conv1D: Transposed}


def quicken_(model: nn.Module) -> None:
    """Let the dropout of a model draw its masks with `draw_kept`, and its linear layers use `product`, in place."""
    for module in model.modules():
        module.__class__ = QUICKER.get(type(module), type(module))


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
