"""Compute the layers of Llama's kind with few torch operations, for decoding.

With one token per reply, calling modules and small operations takes longer than the arithmetic. A cache keeps keys and
values and computes the attention: `sequences.Sequences` or `web.keyvalues.KeyValues`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from layers import Linear
from model import DoubleHeadsModel
from packing import LLAMA_LAYERS, PackedLinear, Part

LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
          "mlp.up_proj", "mlp.down_proj")


class Cache(Protocol):
    """What keeps the keys and values of a pass; a pass has one row of tokens of several sequences."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> object:
        """Store the keys and values of the pass, (1, heads, tokens, size) each."""

    def attend(self, layer: int, query: torch.Tensor, mask: torch.Tensor, attention: Callable, scaling: float,
               softcap: float | None) -> torch.Tensor:
        """Compute the attention of the pass: ``query`` (1, heads, tokens, size) → (1, tokens, heads, size)."""


class LlamaLayer:
    """A layer of Llama, Mistral or Qwen2, computed with its own weights."""

    def __init__(self, layer: nn.Module, number: int, kind: str | None, attention: Callable):
        own = layer.self_attn
        self.number, self.kind, self.size, self.scaling = number, kind, own.head_dim, own.scaling
        self.query, self.key, self.value, self.out, self.gate, self.up, self.down = map(layer.get_submodule, LINEAR)
        self.packed, self.joined = isinstance(self.out, PackedLinear), isinstance(self.query, Part)
        self.heads, self.key_heads = own.config.num_attention_heads, own.config.num_key_value_heads
        self.norms = [(norm.weight.shape, None if self.joined else norm.weight, norm.variance_epsilon)
                      for norm in (layer.input_layernorm, layer.post_attention_layernorm)]  # joined: all weights are 1
        self.activation = layer.mlp.act_fn
        self.silu = own.config.hidden_act in ("silu", "swish")
        self.of_context = partial(attention, own, scaling=self.scaling)

    def __call__(self, states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, cache: Cache,
                 mask: torch.Tensor) -> torch.Tensor:
        every = self.project(F.rms_norm(states, *self.norms[0]))
        both, value = every[:, :self.heads + self.key_heads], every[:, self.heads + self.key_heads:]
        both = torch.addcmul(both * cosines, both.roll(self.size // 2, -1), sines).transpose(0, 1)[None]
        cache.update(both[:, self.heads:], value.transpose(0, 1)[None], self.number)
        attended = cache.attend(self.number, both[:, :self.heads], mask, self._of_context, self.scaling, None)
        states = self.add_attention(states, attended.flatten(2).to(states.dtype))
        return self.add_mlp(states, F.rms_norm(states, *self.norms[1]))

    def project(self, normal: torch.Tensor) -> torch.Tensor:
        """Compute queries, keys and values, (tokens, heads of all three, size)."""
        every = self.query.whole(normal) if self.joined else torch.cat(
            [self.query(normal), self.key(normal), self.value(normal)], -1)
        return every.view(-1, self.heads + 2 * self.key_heads, self.size)

    def add_attention(self, states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return self.out.combine(attended, states, "add") if self.packed else states + self.out(attended)

    def add_mlp(self, states: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
        if not self.packed:
            gate, up = self.gate.whole(normal).chunk(2, -1) if isinstance(self.gate, Part) else (
                self.gate(normal), self.up(normal))
            return states + self.down(self.activation(gate) * up)
        gate = self.gate(normal, "swish") if self.silu else self.activation(self.gate(normal))
        return self.down.combine(self.up.combine(normal, gate, "mul"), states, "add")

    def _of_context(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                    mask: torch.Tensor) -> torch.Tensor:
        return self.of_context(query, key, value, mask.to(query.dtype))[0]


class LlamaBody:
    """The body of a model of Llama's kind."""

    def __init__(self, model: DoubleHeadsModel, layers: list[LlamaLayer]):
        self.model, self.layers = model, layers
        first = layers[0]
        window = getattr(model.config.get_text_config(), "sliding_window", None)
        self.can_extend = model.device.type == "cpu" and not window
        # A query is scaled together with its rotation.
        self.scales = torch.tensor([[first.scaling]] * first.heads + [[1.0]] * first.key_heads, device=model.device)

    def __call__(self, ids: torch.Tensor, types: torch.Tensor, positions: torch.Tensor, cache: Cache,
                 mask: torch.Tensor | dict) -> torch.Tensor:
        """Compute the last hidden states of a row of tokens, (1, tokens, hidden); ``ids`` etc. are (1, tokens)."""
        states = self.model.embed(ids, types)
        cosines, sines = self._rotations(states, positions)
        for layer in self.layers:
            states = layer(states, cosines, sines, cache, mask[layer.kind] if isinstance(mask, dict) else mask)
        return self.model.base_model.norm(states)

    def extend(self, tokens: Sequence[int], kind: int, position: int,
               cache: dict[int, tuple[torch.Tensor, torch.Tensor]], column: int) -> torch.Tensor:
        """Do the same for the next few tokens of a single sequence; each sees all tokens before it.

        Only if `can_extend`. ``cache``: by layer, keys (1, heads, size, columns) and values (1, heads, columns, size);
        ``column``: the place of the first token. Here small operations take most of the time, so there are few.
        """
        device, new, end = self.model.device, len(tokens), column + len(tokens)
        states = self.model.embed(torch.tensor([tokens], device=device), torch.full((1, new), kind, device=device))
        cosines, sines = (table * self.scales for table in self._rotations(
            states.float(), torch.arange(position, position + new, device=device)[None]))
        later = torch.full((new, new), -math.inf, device=device).triu(1) if new > 1 else None
        for layer in self.layers:
            all_keys, all_values = (tensor[0] for tensor in cache[layer.number])
            every = layer.project(_norm(states, layer.norms[0])).float()
            both = every[:, :len(self.scales)]
            both = torch.addcmul(both * cosines, both.roll(layer.size // 2, -1), sines).transpose(0, 1)
            all_keys[..., column:end] = both[layer.heads:].transpose(1, 2)
            all_values[:, column:end] = every[:, len(self.scales):].transpose(0, 1)
            query = both[:layer.heads].reshape(layer.key_heads, -1, layer.size).to(all_keys.dtype)
            scores = torch.bmm(query, all_keys[..., :end])  # (key heads, query heads per key head · tokens, columns)
            if later is not None:
                scores.view(-1, new, end)[..., column:] += later
            attended = torch.bmm(scores.softmax(-1), all_values[:, :end]).view(layer.heads, new, layer.size)
            states = layer.add_attention(states, attended.transpose(0, 1).reshape(1, new, -1).to(states.dtype))
            states = layer.add_mlp(states, _norm(states, layer.norms[1]))
        return self.model.base_model.norm(states)

    def _rotations(self, states: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines, (tokens, 1, size), in the type of ``states``."""
        cosines, sines = (table[0, :, None] for table in self.model.base_model.rotary_emb(states, positions))
        half = cosines.shape[-1] // 2
        return cosines, torch.cat([-sines[..., :half], sines[..., half:]], -1)  # the minus of `rotate_half`


def _norm(states: torch.Tensor, norm: tuple[torch.Size, torch.Tensor | None, float]) -> torch.Tensor:
    """Compute the RMS norm; for one token, F.rms_norm takes twice the time."""
    if states.shape[1] > 1:
        return F.rms_norm(states, *norm)
    (size,), weight, epsilon = norm
    length = torch.linalg.vector_norm(states, dtype=torch.float32).item()
    normal = states * (length * length / size + epsilon) ** -0.5
    return normal if weight is None else normal * weight


def llama_body(model: DoubleHeadsModel) -> LlamaBody | None:
    """Return the body of a model of Llama's kind; None for other layers, or for linear layers that are not plain."""
    layers, config = getattr(model.base_model, "layers", []), model.config
    plain = all(type(layer).__name__ in LLAMA_LAYERS and
                all(type(layer.get_submodule(name)) in (nn.Linear, Linear, PackedLinear, Part) for name in LINEAR)
                for layer in layers)
    if not layers or not plain:
        return None
    attention = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
    kinds = getattr(config, "layer_types", None) or [None] * len(layers)
    return LlamaBody(model, [LlamaLayer(layer, number, kind, attention)
                             for number, (layer, kind) in enumerate(zip(layers, kinds, strict=True))])
