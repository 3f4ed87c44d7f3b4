"""The double-heads network: a language-model head and a next-utterance choice head over packed turns.

The network works on token ids, positions and segments. Texts are turned into these by inputs.py; weights.py loads and
saves the models.
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
from layers import ATTENTION, additive, blocked, candidate_mask
from metrics import rank_of_right


@dataclass
class DoubleHeadsOutput(ModelOutput):
    """The output of both heads for a batch of packed turns.

    - ``lm_loss``: negative log-likelihood per gold token, in nats, averaged over the batch
    - ``mc_loss``: cross-entropy of the gold candidate, averaged over the turns
    - ``turns``: the number of turns; padding does not count
    - ``nll``, ``tokens`` (rows,): the negative log-likelihood of a row's gold tokens, and the number of these tokens
    - ``mc_logits`` (turns, candidates): the candidates' scores; -inf if a turn has fewer candidates
    - ``gold_rank`` (turns,): the rank of the gold candidate, from 1 (`metrics.rank_of_right`); a candidate with the
      same tokens counts as gold
    - ``logits``: the predictions of the gold tokens, (gold tokens, vocabulary), row by row; when decoding,
      (batch, positions kept, vocabulary)
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
    """A mixin for the language models of transformers; its `forward` reads packed rows and computes both heads.

    transformers' ``generate()`` works too, with ``token_type_ids`` and the key-value cache.
    """

    architecture: str  # the class with which plain transformers opens a run folder
    renamed: dict[str, str] = {}  # parts of weight names: in the checkpoint → in this class
    extra_modules: tuple[str, ...] = ()  # modules that the plain architecture lacks; they are saved in another file
    drafts: dict[tuple[int, ...], int] = {}  # for decoding, see drafts.py; `decoding.load_checkpoint` reads them

    @property
    def history_start(self) -> int:
        """The fixed position at which the history begins; 0: right after the persona. See `inputs.build_context`."""
        return getattr(self.config, "history_start", None) or 0

    @property
    def max_positions(self) -> int:
        """The number of positions that a row may use: the run's ``--max_len`` if it has one, or all of the model's."""
        return min(getattr(self.config, "max_len", None) or math.inf, self.config.max_position_embeddings)

    @property
    def max_history(self) -> int:
        """The number of exchanges of history in training; 2, as in 2019, if the config does not say."""
        number = getattr(self.config, "max_history", None)
        return 2 if number is None else number

    @property
    def no_persona(self) -> bool:
        """Whether the run was trained without personas."""
        return getattr(self.config, "no_persona", False)

    @property
    def no_token_types(self) -> bool:
        """Whether the run was trained without token types; if so, `forward` ignores them."""
        return getattr(self.config, "no_token_types", False)

    def encode(self, input_ids, token_type_ids=None, **inputs) -> ModelOutput:
        """Return the body's ``last_hidden_state`` (batch, positions, hidden) and its ``past_key_values``."""
        raise NotImplementedError

    def vocabulary_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Compute the logits of the next token, (…, vocabulary), from hidden states (…, hidden)."""
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
        """Score a batch of packed turns from `inputs.collate`; without ``segment_ids``, return logits for decoding."""
        packed = segment_ids is not None
        if packed:
            attention_mask = self.layer_masks(candidate_mask(segment_ids, visible), position_ids, position_ids)
            if segment_ids.device.type == "cpu" and self.config.get_text_config()._attn_implementation.startswith(
                    ATTENTION):
                half = torch.is_autocast_enabled("cpu")
                attention_mask = blocked(attention_mask, torch.get_autocast_dtype("cpu") if half else self.dtype)
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
            # The hidden state at each position predicts the next token. Only gold tokens need logits.
            if gold_places is None:  # `collate` gives them, because searching here would make a GPU wait
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
                out.turns = ((out.tokens[rows] > 0) & (mc_labels != IGNORED)).sum()
            with torch.autocast(states.device.type, enabled=False):  # half precision would turn near scores into ties
                head = self.multiple_choice_head
                scores = head(last_states.to(head.summary.weight.dtype)[:, :, None]).squeeze(-1).float()
            # Equal candidates share a segment and so its last token. Give them exactly the same score.
            first = (mc_token_ids[:, :, None] == mc_token_ids[:, None, :]).int().argmax(-1)
            scores = scores.gather(1, first)
            out.mc_logits = scores.masked_fill(mc_token_ids == NO_CANDIDATE, float("-inf"))
            gold = mc_token_ids.gather(1, mc_labels.clamp(min=0)[:, None])
            out.gold_rank = rank_of_right(out.mc_logits, mc_token_ids == gold)
            out.mc_loss = F.cross_entropy(out.mc_logits, mc_labels, ignore_index=IGNORED)
        return out

    def layer_masks(self, mask: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | dict:
        """Convert a mask (batch, 1, queries, keys) to the form that the body takes.

        If only some layers have a sliding window, return a dictionary with a mask per kind of layer. ``queries``
        (batch, queries) and ``keys`` (batch, keys) are positions. The window is measured in these and not in places of
        the row, because other candidates lie between a candidate and its context.
        """
        config = self.config.get_text_config()
        window, masks = getattr(config, "sliding_window", None), {"full_attention": mask}
        if window:
            masks["sliding_attention"] = mask & (queries[:, None, :, None] - keys[:, None, None] < window)
        device = mask.device.type
        if device != "cpu" or config._attn_implementation.startswith("eager"):
            # Attention adds numbers to the scores; on GPUs, every layer would convert the mask again.
            half = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if half else self.dtype
            masks = {kind: additive(mask, dtype) for kind, mask in masks.items()}
        kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
        masks = {kind: masks[kind] for kind in set(kinds)}
        return masks if len(masks) > 1 else masks.popitem()[1]


class GPT2DoubleHeads(DoubleHeadsModel, GPT2DoubleHeadsModel):
    """GPT-2 of any size, with both heads."""

    architecture = "GPT2DoubleHeadsModel"

    def __init__(self, config):
        super().__init__(config)
        self._fuse_activations()

    def encode(self, input_ids, token_type_ids=None, **inputs) -> ModelOutput:
        return self.transformer(input_ids, token_type_ids=None if self.no_token_types else token_type_ids, **inputs)

    def _fuse_activations(self) -> None:
        """Replace the tanh GELU of GPT-1 and GPT-2, which transformers spells out, by torch's fused kernel."""
        for block in self.transformer.h:
            if isinstance(block.mlp.act, NewGELUActivation):
                block.mlp.act = nn.GELU(approximate="tanh")


class PostNormBlock(GPT2Block):
    """GPT-1's block: a GPT-2 block with each layer norm after the residual sum instead of before the sublayer."""

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, *args, use_cache=False, **kwargs):
        attended, _ = self.attn(hidden_states, past_key_values=past_key_values, attention_mask=attention_mask,
                                use_cache=use_cache)
        hidden_states = self.ln_1(hidden_states + attended)
        return self.ln_2(hidden_states + self.mlp(hidden_states))


class PostNormConfig(OpenAIGPTConfig):
    """A GPT-1 configuration with the settings that GPT-2's code needs in addition; these are not saved."""

    n_inner = None
    scale_attn_weights = True
    scale_attn_by_inverse_layer_idx = False
    reorder_and_upcast_attn = False
    add_cross_attention = False
    use_cache = True

    @property
    def activation_function(self) -> str:
        return {"gelu": "gelu_new", "swish": "silu"}.get(self.afn, self.afn)  # GPT-1's "gelu" is the tanh version


class PostNormDoubleHeadsModel(GPT2DoubleHeads):
    """GPT-1 with both heads, built on GPT-2's code, which has SDPA, the key-value cache and ``generate()``."""

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
    """The choice head, as in GPT-2, for all other families: hidden states (…, states, hidden) → scores (…, 1).

    It reads the last hidden state only.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.first_dropout, self.summary = nn.Dropout(0.1), nn.Linear(hidden_size, 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.summary(self.first_dropout(states[..., -1, :]))


class TokenTypes(nn.Embedding):
    """Embeddings of the two speakers, which are added to token embeddings; they start at 0."""


class AnyDecoder(DoubleHeadsModel):
    """A mixin that adds both heads and token types to any causal language model of transformers (`decoder_class`).

    GPT-2 uses the embeddings of the speakers' tokens as token types. Other families have no token types, and adding
    such untrained embeddings would disturb a pretrained model. So each speaker has an embedding of its own here, which
    starts at 0: training begins with exactly the pretrained model. ``config.speaker_ids`` holds the two token types.
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
        """Return the input of the first layer: embeddings of tokens plus speakers, (batch, positions, hidden)."""
        embedded = self.get_input_embeddings()(input_ids)
        if token_type_ids is not None and not self.no_token_types:
            embedded = embedded + self.token_types((token_type_ids == self.config.speaker_ids[1]).long())
        return embedded


MODELS = {"gpt2": GPT2DoubleHeads, "openai-gpt": PostNormDoubleHeadsModel}


@cache
def decoder_class(config_class: Any) -> type[AnyDecoder]:
    """Return the double-heads class for a causal language model of transformers, given its configuration class."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    return type(f"DoubleHeads{causal.__name__}", (AnyDecoder, causal), {"architecture": causal.__name__})


HALF = {"O1": torch.float16, "O2": torch.float16, "O3": torch.float16, "bf16": torch.bfloat16}


def half_dtype(device: str, fp16: str = "") -> torch.dtype | None:
    """Return the half-precision type for a value of ``--fp16``; None means float32 (``""`` and O0).

    bf16 means bfloat16. O1, O2 and O3, apex's names, mean float16; on CPUs they mean bfloat16, because CPUs have matrix
    units for it.
    """
    return torch.bfloat16 if fp16 in HALF and torch.device(device).type == "cpu" else HALF.get(fp16)


def autocast(device: str, fp16: str = "") -> torch.autocast:
    """Return a context that computes in the precision of ``fp16`` where this is safe, and in float32 elsewhere."""
    dtype = half_dtype(device, fp16)
    return torch.autocast(torch.device(device).type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
