"""The double-heads network over packed turns: language modelling and next-utterance choice.

Knows token ids, positions and segments; knows nothing about text, files or checkpoints.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GPT2DoubleHeadsModel,
    OpenAIGPTConfig,
    initialization,
)
from transformers.activations import NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.utils import ModelOutput

from inputs import IGNORED, NO_CANDIDATE, find_gold_places
from layers import ATTENTION, additive, candidate_mask
from metrics import rank_of_right


@dataclass
class DoubleHeadsOutput(ModelOutput):
    """What the two heads say of a batch of packed turns.

    ``lm_loss``: negative log-likelihood a gold token, mean over the batch, in nats; ``mc_loss``: cross-entropy of the
    gold candidate, mean over the turns; ``turns``: the number of turns, without those of a row of padding; ``nll`` and
    ``tokens``, both (rows,): a row's gold negative log-likelihood and the number of tokens that it is the sum of;
    ``mc_logits`` (turns, candidates), -inf where a turn has no such candidate; ``gold_rank`` (turns,): the rank of
    the gold one, or of another of the same tokens, from 1 (`metrics.rank_of_right`);
    ``logits``: (tokens, vocabulary), what the gold tokens were predicted with, row by row; or for decoding
    (batch, positions kept, vocabulary).
    """

    lm_loss: torch.Tensor | None = None
    mc_loss: torch.Tensor | None = None
    turns: torch.Tensor | None = None
    nll: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    mc_logits: torch.Tensor | None = None
    gold_rank: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: object = None


if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Network
else:
    _Network = object  # DoubleHeadsModel is mixed into a class that brings the rest


class DoubleHeadsModel(_Network):
    """Mixed into a language model of transformers, the `forward` that reads packed rows and asks both heads.

    ``generate()`` works with ``token_type_ids`` and the key-value cache.
    """

    architecture: str  # what plain transformers opens our folders as
    renamed: dict[str, str] = {}  # checkpoint's weight names → ours
    extra_modules: tuple[str, ...] = ()  # modules that the plain architecture lacks; saved in a file of their own

    @property
    def history_start(self) -> int:
        """The position at which the dialog history always begins; 0: wherever the persona ends. See `build_context`."""
        return getattr(self.config, "history_start", None) or 0

    @property
    def max_positions(self) -> int:
        """Positions that a row may take: what the run was limited to by ``--max_len``, or else all there are."""
        return min(getattr(self.config, "max_len", None) or math.inf, self.config.max_position_embeddings)

    @property
    def max_history(self) -> int:
        """Exchanges of the history that the run was trained on; 2 where its config does not say, as in 2019."""
        number = getattr(self.config, "max_history", None)
        return 2 if number is None else number

    @property
    def no_persona(self) -> bool:
        """Whether the run was trained without personas."""
        return getattr(self.config, "no_persona", False)

    @property
    def no_token_types(self) -> bool:
        """Whether the run was trained without token types; those that it is given are then left out."""
        return getattr(self.config, "no_token_types", False)

    def encode(self, input_ids, token_type_ids=None, **inputs) -> ModelOutput:
        """The body's ``last_hidden_state`` (batch, positions, hidden) and ``past_key_values``."""
        raise NotImplementedError

    def vocabulary_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states (…, hidden) → what the language-model head says of the next token, (…, vocabulary)."""
        logits, config = self.get_output_embeddings()(states), self.config.get_text_config()
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if scale := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scale
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits

    def forward(self, input_ids, token_type_ids=None, position_ids=None, attention_mask=None, segment_ids=None,
                visible=None, labels=None, gold_places=None, mc_token_ids=None, mc_labels=None, mc_rows=None,
                past_key_values=None, use_cache=None, logits_to_keep=0, **kwargs) -> DoubleHeadsOutput:
        """Score packed turns, the batches of `inputs.collate`; without ``segment_ids``, give logits for decoding."""
        packed = segment_ids is not None
        if packed:
            attention_mask = self.layer_masks(candidate_mask(segment_ids, visible), position_ids, position_ids)
            use_cache = False
        body = self.encode(
            input_ids, token_type_ids=token_type_ids, position_ids=position_ids, attention_mask=attention_mask,
            past_key_values=past_key_values, use_cache=use_cache, **kwargs,
        )
        states = body.last_hidden_state
        if not packed:
            logits = self.vocabulary_logits(states[:, -logits_to_keep:])
            return DoubleHeadsOutput(logits=logits, past_key_values=body.past_key_values)

        out = DoubleHeadsOutput()
        if labels is not None:
            # The state at one position predicts the token at the next. Only gold tokens need the vocabulary's logits.
            if gold_places is None:  # on a GPU, to look for them here would wait for all work before
                gold_places = find_gold_places(labels)
            out.logits = self.vocabulary_logits(states.flatten(0, 1)[gold_places]).float()
            token_nll = F.cross_entropy(out.logits, labels.flatten()[gold_places + 1], reduction="none")
            out.tokens = (labels[:, 1:] != IGNORED).sum(1)
            row = gold_places // labels.shape[1]
            out.nll = token_nll.new_zeros(len(labels)).index_add(0, row, token_nll)
            out.lm_loss = token_nll.sum() / out.tokens.sum().clamp(min=1)
        if mc_token_ids is not None:
            rows = torch.arange(len(mc_token_ids), device=mc_token_ids.device) if mc_rows is None else mc_rows
            last_states = states[rows[:, None], mc_token_ids.clamp(min=0)]  # (turns, candidates, hidden)
            if labels is not None:
                out.turns = (out.tokens[rows] > 0).sum()
            with torch.autocast(states.device.type, enabled=False):  # half precision would make ties of near scores
                head = self.multiple_choice_head
                scores = head(last_states.to(head.summary.weight.dtype)[:, :, None]).squeeze(-1).float()
            # Candidates that end at one place are one: the same score to the last bit, whatever the kernel does.
            first = (mc_token_ids[:, :, None] == mc_token_ids[:, None, :]).int().argmax(-1)
            scores = scores.gather(1, first)
            out.mc_logits = scores.masked_fill(mc_token_ids == NO_CANDIDATE, float("-inf"))
            out.gold_rank = rank_of_right(out.mc_logits, mc_token_ids == mc_token_ids.gather(1, mc_labels[:, None]))
            out.mc_loss = F.cross_entropy(out.mc_logits, mc_labels)
        return out

    def layer_masks(self, mask: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | dict:
        """A mask (batch, 1, queries, keys) as the body takes it; where its layers see unequally far, one for each kind.

        ``queries`` (batch, queries), ``keys`` (batch, keys): their positions. A sliding window counts those, not places
        in the row: between a candidate and its context lie its siblings.
        """
        config = self.config.get_text_config()
        window, masks = getattr(config, "sliding_window", None), {"full_attention": mask}
        if window:
            masks["sliding_attention"] = mask & (queries[:, None, :, None] - keys[:, None, None] < window)
        if config._attn_implementation.startswith("eager"):  # which adds its mask to the scores
            masks = {kind: additive(mask, self.dtype) for kind, mask in masks.items()}
        elif config._attn_implementation.startswith(ATTENTION) and torch.is_autocast_enabled(mask.device.type) and \
                mask.device.type == "cpu":  # `packed_attention` adds it, in every layer
            masks = {kind: additive(mask, torch.get_autocast_dtype("cpu")) for kind, mask in masks.items()}
        kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
        masks = {kind: masks[kind] for kind in set(kinds)}
        return masks if len(masks) > 1 else masks.popitem()[1]


class GPT2DoubleHeads(DoubleHeadsModel, GPT2DoubleHeadsModel):
    """GPT-2 with both heads, of any size."""

    architecture = "GPT2DoubleHeadsModel"

    def __init__(self, config):
        super().__init__(config)
        self._fuse_activations()

    def encode(self, input_ids, token_type_ids=None, **inputs) -> ModelOutput:
        return self.transformer(input_ids, token_type_ids=None if self.no_token_types else token_type_ids, **inputs)

    def _fuse_activations(self) -> None:
        """The tanh GELU of both families as one kernel: the same function."""
        for block in self.transformer.h:
            if isinstance(block.mlp.act, NewGELUActivation):
                block.mlp.act = nn.GELU(approximate="tanh")


class PostNormBlock(GPT2Block):
    """GPT-1's block: GPT-2's with each layer norm behind the residual sum instead of before the sublayer."""

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, *args, use_cache=False, **kwargs):
        attended, _ = self.attn(hidden_states, past_key_values=past_key_values, attention_mask=attention_mask,
                                use_cache=use_cache)
        hidden_states = self.ln_1(hidden_states + attended)
        return self.ln_2(hidden_states + self.mlp(hidden_states))


class PostNormConfig(OpenAIGPTConfig):
    """A GPT-1 configuration, with what GPT-2's code asks for and GPT-1's leaves unsaid (not written to config.json)."""

    n_inner = None
    scale_attn_weights = True
    scale_attn_by_inverse_layer_idx = False
    reorder_and_upcast_attn = False
    add_cross_attention = False
    use_cache = True

    @property
    def activation_function(self) -> str:
        return {"gelu": "gelu_new", "swish": "silu"}.get(self.afn, self.afn)  # GPT-1's "gelu" is the tanh one


class PostNormDoubleHeadsModel(GPT2DoubleHeads):
    """GPT-1 with both heads, on GPT-2's code, which brings SDPA, the key-value cache and ``generate()``."""

    config_class = PostNormConfig
    architecture = "OpenAIGPTDoubleHeadsModel"
    renamed = {"tokens_embed": "wte", "positions_embed": "wpe"}

    def __init__(self, config: PostNormConfig):
        super().__init__(config)
        self.transformer.h = nn.ModuleList(PostNormBlock(config, layer_idx=i) for i in range(config.n_layer))
        self.transformer.ln_f = nn.Identity()
        self._fuse_activations()
        self.post_init()


class ChoiceHead(nn.Module):
    """One number from the last of some states: (…, states, hidden) → (…, 1). GPT-2's own head, for everybody else."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.first_dropout, self.summary = nn.Dropout(0.1), nn.Linear(hidden_size, 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.summary(self.first_dropout(states[..., -1, :]))


class TokenTypes(nn.Embedding):
    """What is added to a token's embedding for its speaker: two rows, which start at 0."""


class AnyDecoder(DoubleHeadsModel):
    """Both heads and token types on a causal language model of transformers; `decoder_class` says on which.

    Other families have no token types, and GPT-2's way, the speaker's own token embedding added to every token, would
    disturb a pretrained model at random until it is learnt. So each speaker gets a row of its own, which is 0 at first:
    training begins at exactly the pretrained model. ``config.speaker_ids`` says which ids the types are.
    """

    extra_modules = ("multiple_choice_head", "token_types")

    def __init__(self, config):
        super().__init__(config)
        self.multiple_choice_head = ChoiceHead(self.get_output_embeddings().weight.shape[1])
        self.token_types = TokenTypes(2, self.get_input_embeddings().weight.shape[1])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TokenTypes):
            initialization.zeros_(module.weight)
        else:
            super()._init_weights(module)

    def encode(self, input_ids, token_type_ids=None, **inputs) -> ModelOutput:
        return self.base_model(inputs_embeds=self.embed(input_ids, token_type_ids), **inputs)

    def embed(self, input_ids, token_type_ids=None) -> torch.Tensor:
        """What the first layer reads: (batch, positions, hidden)."""
        embedded = self.get_input_embeddings()(input_ids)
        if token_type_ids is not None and not self.no_token_types:
            embedded = embedded + self.token_types((token_type_ids == self.config.speaker_ids[1]).long())
        return embedded


MODELS = {"gpt2": GPT2DoubleHeads, "openai-gpt": PostNormDoubleHeadsModel}


@cache
def decoder_class(config_class: Any) -> type[AnyDecoder]:
    """The double-heads model of a family that transformers knows as a causal language model by ``config_class``."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    return type(f"DoubleHeads{causal.__name__}", (AnyDecoder, causal), {"architecture": causal.__name__})


HALF = {"O1": torch.float16, "O2": torch.float16, "O3": torch.float16, "bf16": torch.bfloat16}


def half_dtype(device: str, fp16: str = "") -> torch.dtype | None:
    """The type that ``fp16`` asks for on a device; None, for ``""`` and O0, is float32.

    O1, O2 and O3 are apex's names and mean float16, on a CPU bfloat16, which its matrix units have; bf16 is bfloat16.
    """
    return torch.bfloat16 if fp16 in HALF and torch.device(device).type == "cpu" else HALF.get(fp16)


def autocast(device: str, fp16: str = "") -> torch.autocast:
    """The context that computes in ``fp16``'s precision where that is safe, and adds up in float32."""
    dtype = half_dtype(device, fp16)
    return torch.autocast(torch.device(device).type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
