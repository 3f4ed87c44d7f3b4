"""The double-heads network over packed turns: language modelling and next-utterance choice; loading and saving it.

Knows token ids, positions and segments; knows nothing about text or files of dialogs.
"""

import json
import logging
import math
import os
import shutil
from argparse import ArgumentParser
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners import lora
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    GPT2DoubleHeadsModel,
    OpenAIGPTConfig,
    initialization,
)
from transformers.activations import NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.pytorch_utils import Conv1D
from transformers.utils import ModelOutput, cached_file

from cli import InputError, command, short
from files import ARGUMENTS, each_once, replacing, unfinished, write_tensors, write_text
from inputs import IGNORED, NO_CANDIDATE, places_before
from layers import ATTENTION, LowRankLinear, additive, candidate_mask
from metrics import ranks
from utils import (
    ATTR_TO_SPECIAL_TOKEN,
    NAMED,
    SPECIAL_TOKENS,
    adapter_base,
    from_file,
    get_tokenizer,
    is_checkpoint_file,
    is_gguf,
    quiet_transformers,
    read_config,
    resolve_checkpoint,
    save_tokenizer,
)

logger = logging.getLogger(__name__)


@dataclass
class DoubleHeadsOutput(ModelOutput):
    """What the two heads say of a batch of packed turns.

    ``lm_loss``: negative log-likelihood a gold token, mean over the batch, in nats; ``mc_loss``: cross-entropy of the
    gold candidate, mean over the turns; ``turns``: the number of turns, without those of a row of padding; ``nll`` and
    ``tokens``, both (rows,): a row's gold negative log-likelihood and the number of tokens that it is the sum of;
    ``mc_logits`` (turns, candidates), -inf where a turn has no such candidate; ``gold_rank`` (turns,): the rank of
    the gold one, or of another of the same tokens, from 1 (`metrics.ranks`);
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


class DoubleHeadsModel:
    """Mixed into a language model of transformers, the `forward` that reads packed rows and asks both heads.

    ``generate()`` works with ``token_type_ids`` and the key-value cache.
    """

    architecture: str  # what plain transformers opens our folders as
    renamed: dict[str, str] = {}  # checkpoint's weight names → ours
    apart: tuple[str, ...] = ()  # modules that the plain architecture lacks; saved in a file of their own

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

    def read(self, input_ids, token_type_ids=None, **inputs) -> ModelOutput:
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
        body = self.read(
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
                gold_places = places_before(labels)
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
            out.gold_rank = ranks(out.mc_logits, mc_token_ids == mc_token_ids.gather(1, mc_labels[:, None]))
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
                mask.device.type == "cpu":  # `attend` adds it, in every layer
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

    def read(self, input_ids, token_type_ids=None, **inputs) -> ModelOutput:
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

    apart = ("multiple_choice_head", "token_types")

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

    def read(self, input_ids, token_type_ids=None, **inputs) -> ModelOutput:
        return self.base_model(inputs_embeds=self.embed(input_ids, token_type_ids), **inputs)

    def embed(self, input_ids, token_type_ids=None) -> torch.Tensor:
        """What the first layer reads: (batch, positions, hidden)."""
        embedded = self.get_input_embeddings()(input_ids)
        if token_type_ids is not None and not self.no_token_types:
            embedded = embedded + self.token_types((token_type_ids == self.config.speaker_ids[1]).long())
        return embedded


MODELS = {"gpt2": GPT2DoubleHeads, "openai-gpt": PostNormDoubleHeadsModel}


@cache
def decoder_class(config_class: type) -> type[AnyDecoder]:
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


def load_model(model_checkpoint: str, rank: int = 0, to_adapt: bool = False) -> DoubleHeadsModel:
    """The double-heads model of a checkpoint, in evaluation mode and float32, on the CPU.

    ``model_checkpoint`` is what `utils.resolve_checkpoint` takes: a hub name, a run folder of ours or of 2019, a folder
    without weights, which starts at random with a warning, a checkpoint file of a training, or the folder of a PEFT
    adapter, which is merged into the model that it names; an adapter of rank ``rank`` stays apart, to be trained on.
    ``to_adapt``: an adapter will bring what the checkpoint lacks. Weights are read as tensors only; no pickled code
    runs. Raises `InputError` when there is none, it cannot be read, or it cannot read packed rows.
    """
    checkpoint = resolve_checkpoint(model_checkpoint)
    if is_checkpoint_file(checkpoint):
        return _of_training(checkpoint)
    if left := unfinished(Path(checkpoint)):
        logger.warning("%s: this is the model of the last whole epoch, and the run is %s", checkpoint, left)
    if base := adapter_base(checkpoint):
        return _adapted(checkpoint, base, rank)
    config = read_config(checkpoint)
    model_class = MODELS.get(config.model_type) or decoder_class(type(config))
    try:
        if config.model_type in MODELS:
            with quiet_transformers():
                config = model_class.config_class.from_pretrained(**from_file(checkpoint), num_labels=1,
                                                                  attn_implementation="sdpa")
        vars(config).pop("n_special", None)  # with which early 2019 counted the control tokens, once or twice
        if rows := _vocabulary_rows(checkpoint):
            config.vocab_size = rows
        if os.path.isdir(checkpoint) and not _weight_files(checkpoint):
            logger.warning("%s has no weights: starting from RANDOM ones", checkpoint)
            config.dtype = torch.float32
            model, missing = model_class(config), set()
        else:
            gguf = is_gguf(checkpoint)
            with quiet_transformers():
                names = {} if gguf else {"key_mapping": EARLY_NAMES | model_class.renamed}
                model, found = model_class.from_pretrained(**from_file(checkpoint), **names, config=config,
                                                           dtype=torch.float32, output_loading_info=True)
            tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
            missing = set(found["missing_keys"]) - tied
            if gguf:  # its weights are plain float32 now; the library would refuse to save or train "quantized" ones
                del model.config.quantization_config
                model.hf_quantizer, model.is_quantized = None, False
            elif model.apart and (heads := cached_file(checkpoint, HEADS, _raise_exceptions_for_missing_entries=False)):
                model.load_state_dict(load_file(heads), strict=False)
                missing -= load_file(heads).keys()
    except UnpicklingError:
        raise InputError(f"--model_checkpoint {checkpoint}: its .bin file is damaged, or holds code beside weights, "
                         "which is not run; take a model.safetensors from who made it") from None
    except Exception as error:  # torch, safetensors and transformers each raise their own for damaged files
        reason = str(error).strip().split("\n")[0][:160]
        if "ignore_mismatched_sizes" in reason:
            reason = "they have other sizes than its config.json says"
        raise InputError(f"--model_checkpoint {checkpoint}: its weights cannot be loaded ({reason}); "
                         "fetch or train the model again") from None
    fresh = {name.split(".")[0] for name in missing} - {"multiple_choice_head", "token_types"}
    if fresh:
        raise InputError(f"--model_checkpoint {checkpoint}: its weights are not those of a whole "
                         f"{config.model_type} model; fetch or train the model again")
    if missing and not to_adapt:
        logger.info("%s has no choice head: starting it at random", checkpoint)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
    model.generation_config = GenerationConfig()  # decoding has flags; what a 2019 config wished for is not one
    model.config.is_encoder_decoder = False
    if not all(torch.isfinite(weight).all() for weight in model.eval().parameters()):
        raise InputError(f"--model_checkpoint {checkpoint}: some of its weights are not numbers, as when training went "
                         "wrong; take an earlier checkpoint")
    if isinstance(model, AnyDecoder):
        _check_packing(model, checkpoint)
    _check_row(model, checkpoint)
    return model


# What other programs called weights, as patterns: early 2019's own, and torch's DataParallel.
EARLY_NAMES = {r"^module\.": "", r"^multiple_choice_head\.linear\.": "multiple_choice_head.summary.",
               r"^lm_head\.decoder\.": "lm_head."}
HEADS = "double_heads.safetensors"  # in a run folder: the modules that the plain architecture lacks


def _weight_files(folder: str) -> list[Path]:
    """The files of weights in a folder. Raises ``ValueError`` when an index of them names one elsewhere."""
    for index in Path(folder).glob("*.index.json"):
        names = json.loads(index.read_text("utf-8"))["weight_map"].values()
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index.name} names {outside[0]}, outside the folder")
    return [path for path in Path(folder).iterdir() if path.suffix in (".safetensors", ".bin")
            and path.name.startswith(("model", "pytorch_model")) and path.name != "model_training_args.bin"]


def _vocabulary_rows(checkpoint: str) -> int | None:
    """Rows of the token embeddings that lie in a folder; None where GPT-1's and GPT-2's are not found."""
    for path in _weight_files(checkpoint) if os.path.isdir(checkpoint) else []:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        else:
            tensors = torch.load(path, map_location="meta", weights_only=True)
            shapes = {name: list(getattr(tensor, "shape", [])) for name, tensor in tensors.items()}
        for name, shape in shapes.items():
            if name.endswith(("tokens_embed.weight", "wte.weight")) and len(shape) == 2:
                return shape[0]
    return None


@torch.no_grad()
def _check_row(model: DoubleHeadsModel, checkpoint: str) -> None:
    """Whether a packed row comes through the network. Raises `InputError` if not."""
    row = {"input_ids": [0, 1, 2, 1, 3], "position_ids": [0, 1, 2, 1, 2], "segment_ids": [0, 1, 1, 2, 2],
           "labels": [IGNORED] * 4 + [3], "mc_token_ids": [2, 4]}
    reason = "its losses are not numbers"
    try:
        out = model(**{name: torch.tensor([values]) for name, values in row.items()}, mc_labels=torch.tensor([1]))
        if torch.isfinite(out.lm_loss) and torch.isfinite(out.mc_loss):
            return
    except Exception as error:  # each setting of config.json has its own way to fail
        reason = str(error).strip().split("\n")[0][:160]
    raise InputError(f"--model_checkpoint {checkpoint}: its weights and config.json make no network that computes "
                     f"({reason}); fetch or train the model again")


@torch.no_grad()
def _check_packing(model: AnyDecoder, checkpoint: str) -> None:
    """Whether the model says of a packed candidate what its family's own code says of the same candidate alone.

    So it is for attention over positions that can be given (learnt ones, rotations), and not where distance is counted
    in the row (ALiBi) or a state is handed from token to token (Mamba). Raises `InputError` for those.
    """
    context, reply = [1, 2, 3, 4, 5], [6, 7, 8, 9]
    row = {"input_ids": [*context, 9, 8, 7, *reply], "position_ids": [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8],
           "segment_ids": [0] * 5 + [1] * 3 + [2] * 4, "labels": [IGNORED] * 9 + reply[1:]}
    config, agrees = model.config.get_text_config(), False
    try:
        packed = model(**{name: torch.tensor([values]) for name, values in row.items()}).logits
        alone = super(DoubleHeadsModel, model).forward(input_ids=torch.tensor([context + reply])).logits[0, 5:8].float()
        agrees = torch.allclose(packed, alone, rtol=0, atol=1e-4 * alone.std().item() + 1e-6)
        reason = "a packed candidate comes out differently than alone"
    except KeyError as kind:
        reason = f"it has layers of {kind}"
    except Exception as error:  # each family has its own way to fail
        reason = str(error).strip().split("\n")[0][:160]
    if getattr(config, "alibi", not hasattr(config, "max_position_embeddings")) or \
            "local" in getattr(config, "attention_layers", ()):  # GPT-Neo's window, which no short row shows
        agrees, reason = False, "it counts distances in the row"
    if not agrees:
        raise InputError(f"--model_checkpoint {checkpoint}: a '{config.model_type}' model cannot read a turn as one "
                         f"row ({reason}); choose a decoder with positions: llama, qwen3, gpt_neox, opt, …")


SPARE_ROWS = 1024  # at most; vocabularies are padded to a round number, Phi-2's by 905


def add_special_tokens_(model: DoubleHeadsModel, tokenizer) -> None:
    """Give the model's vocabulary room for the tokenizer's control tokens, in place; new rows start at random.

    Raises `InputError` when the model's vocabulary is neither the tokenizer's nor that without its control tokens.
    """
    tokenizer.add_special_tokens(ATTR_TO_SPECIAL_TOKEN)
    have, want = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if not want - len(SPECIAL_TOKENS) <= have <= want + SPARE_ROWS:
        raise InputError(f"--model_checkpoint: the model knows {have:,} tokens and its tokenizer {want:,} (control "
                         "tokens included); put the tokenizer's files that the model was trained with into its folder")
    if have < want:
        model.resize_token_embeddings(want, mean_resizing=False)
    if (last := max(tokenizer.get_vocab().values())) >= max(have, want):
        raise InputError(f"--model_checkpoint: the model knows {max(have, want):,} tokens, its tokenizer's ids go to "
                         f"{last:,}; put the tokenizer's files that the model was trained with into its folder")
    model.config.speaker_ids = tokenizer.convert_tokens_to_ids(ATTR_TO_SPECIAL_TOKEN["additional_special_tokens"])


def add_lora_(model: DoubleHeadsModel, tokenizer, rank: int, model_checkpoint: str) -> None:
    """Freeze the model, in place, but for low-rank updates of its linear layers (Hu et al. 2021).

    Trained whole beside them: the choice head, the token types and the control tokens' own rows.
    ``model_checkpoint``: what the model was loaded from, which the adapter will name as its base. A model that was
    loaded with an adapter of this rank gets no other. Raises `InputError` when the checkpoint has no weights.
    """
    if getattr(model, "peft_config", None):
        return
    base = resolve_checkpoint(model_checkpoint)
    if os.path.isdir(base) and not adapter_base(base) and not _weight_files(base):
        raise InputError(f"--lora: {base} has no weights, and random ones would not be there to adapt when the adapter "
                         "is loaded; train it without --lora, or name a model with weights")
    named = model_checkpoint in NAMED or not os.path.exists(base)  # a name finds the base on other machines, too
    model.name_or_path = model_checkpoint if named else os.path.abspath(base)
    names = {module: name for name, module in model.named_modules()}
    tables = {model.get_input_embeddings(), *([] if model.all_tied_weights_keys else [model.get_output_embeddings()])}
    linear = linear_layers(model)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=[names[module] for module in linear],
        fan_in_fan_out=model.config.model_type in MODELS,  # Conv1D's way
        modules_to_save=["multiple_choice_head",
                         *(["token_types"] if isinstance(model, AnyDecoder) and not model.no_token_types else [])],
        trainable_token_indices={names[table]: tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) for table in tables},
        base_model_name_or_path=model.name_or_path, task_type="CAUSAL_LM",
    )
    with quiet_transformers():
        get_peft_model(model, config)
    _prepare_adapter_(model)


def _prepare_adapter_(model: DoubleHeadsModel) -> None:
    """Have the adapter's layers computed in one pass each, and say how much is trained."""
    for layer in model.modules():
        if type(layer) is lora.Linear:
            layer.__class__ = LowRankLinear
    model.train(model.training)  # the new layers too
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info("LoRA of rank %s: %s parameters are trained", model.peft_config["default"].r, f"{trained:,}")


def linear_layers(model: DoubleHeadsModel) -> list[nn.Module]:
    """The linear layers of the model's blocks: neither of its heads."""
    return [module for module in model.base_model.modules() if isinstance(module, nn.Linear | Conv1D)]


def _adapted(checkpoint: str, base: str, rank: int) -> DoubleHeadsModel:
    """The model of an adapter's folder: its base as it was trained on, with the adapter merged into it.

    An adapter of rank ``rank`` is not merged but left as `add_lora_` makes one.
    """
    folders = [os.path.realpath(checkpoint)]
    try:
        while next_base := adapter_base(folders[-1]):
            folders.append(os.path.realpath(resolve_checkpoint(next_base)))
            if folders.count(folders[-1]) > 1:
                raise InputError("whose adapter_config.json names itself as the model that it adapts; name the base "
                                 "model there")
        model = load_model(base, to_adapt=True)
    except InputError as error:
        raise InputError(f"--model_checkpoint {checkpoint}: adapts {base}: {error}") from None
    config = read_config(checkpoint)
    if config.vocab_size > model.get_input_embeddings().weight.shape[0]:  # room for control tokens
        model.resize_token_embeddings(config.vocab_size, mean_resizing=False)
    _as_trained_(model, config)
    try:
        with quiet_transformers():
            adapted = PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
            if adapted.peft_config["default"].r == rank:
                _prepare_adapter_(model)
            else:
                model = adapted.merge_and_unload()
    except Exception as error:  # peft and torch each raise their own
        reason = str(error).strip().split("\n")[0][:160]
        raise InputError(f"--model_checkpoint {checkpoint}: its adapter does not fit {base} ({reason}); "
                         "fetch or train it again") from None
    return model.eval()


def _as_trained_(model: DoubleHeadsModel, config) -> None:
    """Let a base model read turns as the configuration of what adapts it says."""
    how_it_was_trained = {"history_start", "max_history", "max_len", "no_persona", "no_token_types", "speaker_ids",
                          "trained_on"}
    for name in how_it_was_trained & vars(config).keys():
        setattr(model.config, name, getattr(config, name))


@torch.no_grad()
def _of_training(checkpoint: str) -> DoubleHeadsModel:
    """The model of a training's checkpoint file, as it was then; its adapter, if it has one, is merged into it."""
    config, path = read_config(checkpoint), Path(checkpoint)
    try:
        with safe_open(path, framework="pt") as file:
            state = {key[len("model."):]: file.get_tensor(key) for key in file.keys() if key.startswith("model.")}
        if adapted := any(".lora_A." in name for name in state):
            began = json.loads((path.absolute().parents[1] / ARGUMENTS).read_text("utf-8"))
            base, rank, tokenizer = began["model_checkpoint"], began["lora"], get_tokenizer(checkpoint)
            model = load_model(base, rank)
            add_special_tokens_(model, tokenizer)
            _as_trained_(model, config)
            add_lora_(model, tokenizer, rank, base)
        else:
            model_class = MODELS.get(config.model_type) or decoder_class(type(config))
            model = model_class(model_class.config_class.from_dict(config.to_dict() | {"dtype": "float32"}))
        weights = each_once(model)
        if weights.keys() != state.keys():
            raise ValueError("it has other weights than its configuration says")
        for name, weight in weights.items():
            weight.copy_(state[name])
    except (SafetensorError, OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"--model_checkpoint {checkpoint}: its model cannot be made ({short(str(error))}); go on with "
                         f"train.py --resume {path.parents[1]} instead") from None
    if adapted:
        with TemporaryDirectory() as folder:
            save_model(model, folder)
            return load_model(folder)
    model.generation_config = GenerationConfig()
    _check_row(model.eval(), checkpoint)
    return model


def save_model(model: DoubleHeadsModel, folder: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write ``model.safetensors`` and ``config.json`` as plain transformers reads them, each complete or not at all.

    What the plain architecture lacks goes to ``double_heads.safetensors`` beside them. Of a model under `add_lora_`
    only the adapter is written, as PEFT does, and ``config.json``. ``state``: the weights by name, where the model
    itself holds only a part of each. They are saved in float32.
    """
    folder = Path(folder)
    if adapters := getattr(model, "peft_config", None):
        adapter = get_peft_model_state_dict(model, state, save_embedding_layers=False)
        adapter = {f"base_model.model.{name}": tensor.contiguous().cpu().float() for name, tensor in adapter.items()}
        write_tensors(adapter, folder / "adapter_model.safetensors", {"format": "pt"})
        with TemporaryDirectory(dir=folder) as made, replacing(folder / "adapter_config.json") as unfinished:
            adapters["default"].save_pretrained(made)
            os.replace(Path(made, "adapter_config.json"), unfinished)
        _write_config(model, folder)
        return
    names = {ours: theirs for theirs, ours in model.renamed.items()}
    weights, heads = {}, {}
    for name, tensor in (state or model.state_dict()).items():
        if name not in model.all_tied_weights_keys:
            file = heads if name.split(".")[0] in model.apart else weights
            file[".".join(names.get(part, part) for part in name.split("."))] = tensor.contiguous().cpu().float()
    write_tensors(weights, folder / "model.safetensors", {"format": "pt"})
    if heads:
        write_tensors(heads, folder / HEADS, {"format": "pt"})
    _write_config(model, folder)


def _write_config(model: DoubleHeadsModel, folder: Path) -> None:
    config = model.config.to_diff_dict() | {"architectures": [model.architecture]}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = ArgumentParser(description="Merge the adapter that `train.py --lora` made into its base model.")
    parser.add_argument("run", help="the adapter's run folder")
    parser.add_argument("folder", type=Path, help="the ordinary run folder to write")
    parser.add_argument("--adapter", action="store_true",
                        help="write the adapter itself, in half the bytes (bfloat16), to pass it on")
    args = parser.parse_args()
    run = resolve_checkpoint(args.run)
    if not adapter_base(run):
        raise InputError(f"{args.run}: has no adapter_config.json; there is nothing to merge")
    model, tokenizer = load_model(run), get_tokenizer(run)
    add_special_tokens_(model, tokenizer)
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(tokenizer, args.folder)
        if args.adapter:
            shutil.copy(Path(run, "adapter_config.json"), args.folder)
            vars(model.config).pop("trained_on", None)  # a file on this machine
            _write_config(model, args.folder)
            adapter = load_file(Path(run, "adapter_model.safetensors"))
            write_tensors({name: tensor.bfloat16() for name, tensor in adapter.items()},
                          args.folder / "adapter_model.safetensors", {"format": "pt"})
        else:
            save_model(model, args.folder)
    except OSError as error:
        raise InputError(f"{args.folder}: cannot be written ({error.strerror or error})") from None


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(main)
