"""Load and save double-heads models: checkpoints of every kind, control tokens, low-rank adapters.

    python weights.py RUN FOLDER    # merge the adapter that `train.py --lora` made into its base model
"""

import json
import logging
import os
import shutil
from argparse import ArgumentParser
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners import lora
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from cli import InputError, command, short
from files import ARGUMENTS, describe_unfinished, distinct_tensors, replacing, write_tensors, write_text
from inputs import IGNORED
from layers import ATTENTION, LowRankLinear, quicken_
from model import MODELS, AnyDecoder, DoubleHeadsModel, decoder_class
from pretrained import (
    NAMED,
    adapter_base,
    is_checkpoint_file,
    is_gguf,
    loading_arguments,
    quick_gguf,
    quiet_transformers,
    read_config,
    resolve_checkpoint,
)
from tokenization import ATTR_TO_SPECIAL_TOKEN, SPECIAL_TOKENS, Tokenizer, get_tokenizer, save_tokenizer

logger = logging.getLogger(__name__)


@quick_gguf()
def load_model(model_checkpoint: str, rank: int = 0, to_adapt: bool = False) -> DoubleHeadsModel:
    """Load a double-heads model, in evaluation mode and float32, on the CPU.

    ``model_checkpoint`` is anything that `resolve_checkpoint` takes: a hub name, a run folder (also one of 2019), a
    folder without weights (a warning says that they are random), a checkpoint file of a run, or the folder of a PEFT
    adapter. An adapter is merged into its base model, unless it has the rank ``rank``; then it stays separate, so that
    training can continue. ``to_adapt``: do not report a missing choice head, because an adapter will bring it. Weights
    are read as tensors; no pickled code runs. Raises `InputError` if there is no such model, or it cannot be read, or
    it cannot compute packed rows.
    """
    checkpoint = resolve_checkpoint(model_checkpoint)
    if is_checkpoint_file(checkpoint):
        return _of_training(checkpoint)
    if left := describe_unfinished(Path(checkpoint)):
        logger.warning("%s: this is the model of the last complete epoch; the run is %s", checkpoint, left)
    if base := adapter_base(checkpoint):
        return _adapted(checkpoint, base, rank)
    config = read_config(checkpoint)
    model_class: Any = MODELS.get(config.model_type) or decoder_class(type(config))  # type: ignore[arg-type]
    try:
        if config.model_type in MODELS:
            with quiet_transformers():
                config = model_class.config_class.from_pretrained(**loading_arguments(checkpoint), num_labels=1,
                                                                  attn_implementation="sdpa")
        vars(config).pop("n_special", None)  # early 2019's count of control tokens, some of which it counted twice
        if rows := _vocabulary_rows(checkpoint):
            config.vocab_size = rows
        if os.path.isdir(checkpoint) and not _weight_files(checkpoint):
            logger.warning("%s has no weights: starting from RANDOM weights", checkpoint)
            config.dtype = torch.float32
            model, missing = model_class(config), set()
        else:
            gguf = is_gguf(checkpoint)
            with quiet_transformers():
                names = {} if gguf else {"key_mapping": EARLY_NAMES | model_class.renamed}
                model, found = model_class.from_pretrained(**loading_arguments(checkpoint), **names, config=config,
                                                           dtype=torch.float32, output_loading_info=True)
            tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
            missing = set(found["missing_keys"]) - tied
            if gguf:  # the weights are plain float32 now; transformers would not save or train "quantized" weights
                del model.config.quantization_config
                model.hf_quantizer, model.is_quantized = None, False
            elif model.extra_modules and (
                    heads := cached_file(checkpoint, HEADS, _raise_exceptions_for_missing_entries=False)):
                model.load_state_dict(load_file(heads), strict=False)
                missing -= load_file(heads).keys()
    except UnpicklingError:
        raise InputError(f"--model_checkpoint {checkpoint}: its .bin file is damaged or contains code, which is not "
                         "run; get a model.safetensors of this model instead") from None
    except Exception as error:  # torch, safetensors and transformers raise many types for damaged files
        reason = str(error).strip().split("\n")[0][:160]
        if "ignore_mismatched_sizes" in reason:
            reason = "their sizes differ from those in its config.json"
        raise InputError(f"--model_checkpoint {checkpoint}: its weights cannot be loaded ({reason}); "
                         "fetch or train the model again") from None
    fresh = {name.split(".")[0] for name in missing} - {"multiple_choice_head", "token_types"}
    if fresh:
        raise InputError(f"--model_checkpoint {checkpoint}: its weights are not those of a complete "
                         f"{config.model_type} model; fetch or train the model again")
    if missing and not to_adapt:
        logger.info("%s has no choice head: starting from a random one", checkpoint)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
    quicken_(model)
    model.generation_config = GenerationConfig()  # decoding options are flags; a 2019 config must not change them
    model.config.is_encoder_decoder = False
    if not all(torch.isfinite(weight).all() for weight in model.eval().parameters()):
        raise InputError(f"--model_checkpoint {checkpoint}: some of its weights are not numbers, as after a training "
                         "that diverged; use an earlier checkpoint")
    if isinstance(model, AnyDecoder):
        _check_packing(model, checkpoint)
    _check_row(model, checkpoint)
    return model


# Patterns of weight names that early 2019's script and torch's DataParallel used, and their names today.
EARLY_NAMES = {r"^module\.": "", r"^multiple_choice_head\.linear\.": "multiple_choice_head.summary.",
               r"^lm_head\.decoder\.": "lm_head."}
HEADS = "double_heads.safetensors"  # the file with `extra_modules` in a run folder


def _weight_files(folder: str) -> list[Path]:
    """List the files of weights in a folder. Raises ``ValueError`` if an index names a file outside the folder."""
    for index in Path(folder).glob("*.index.json"):
        names = json.loads(index.read_text("utf-8"))["weight_map"].values()
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index.name} names {outside[0]}, outside the folder")
    return [path for path in Path(folder).iterdir() if path.suffix in (".safetensors", ".bin")
            and path.name.startswith(("model", "pytorch_model")) and path.name != "model_training_args.bin"]


def _vocabulary_rows(checkpoint: str) -> int | None:
    """Return the number of token embeddings in a folder's weights; None unless they are GPT-1's or GPT-2's."""
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
    """Compute one packed row. Raises `InputError` if this fails or the losses are not finite."""
    row = {"input_ids": [0, 1, 2, 1, 3], "position_ids": [0, 1, 2, 1, 2], "segment_ids": [0, 1, 1, 2, 2],
           "labels": [IGNORED] * 4 + [3], "mc_token_ids": [2, 4]}
    reason = "its losses are not numbers"
    try:
        out = model(**{name: torch.tensor([values]) for name, values in row.items()}, mc_labels=torch.tensor([1]))
        if torch.isfinite(out.lm_loss) and torch.isfinite(out.mc_loss):
            return
    except Exception as error:  # a bad config.json can fail in many ways
        reason = str(error).strip().split("\n")[0][:160]
    raise InputError(f"--model_checkpoint {checkpoint}: its weights and config.json do not make a working network "
                     f"({reason}); fetch or train the model again")


# Relative to the spread of logits: rounding in pretrained models reaches 4e-4; the error of a wrong network is
# 0.1 or more.
ROUNDING = 1e-2


@torch.no_grad()
def _check_packing(model: AnyDecoder, checkpoint: str) -> None:
    """Compare the logits of a packed candidate with those of the same candidate alone, computed by transformers.

    They agree if the attention uses given positions (learnt positions, rotations). They differ if distances are counted
    in the row (ALiBi) or a state is passed from token to token (Mamba). Raises `InputError` if they differ.
    """
    context, reply = [1, 2, 3, 4, 5], [6, 7, 8, 9]
    row = {"input_ids": [*context, 9, 8, 7, *reply], "position_ids": [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8],
           "segment_ids": [0] * 5 + [1] * 3 + [2] * 4, "labels": [IGNORED] * 9 + reply[1:]}
    config, agrees = model.config.get_text_config(), False
    try:
        packed = model(**{name: torch.tensor([values]) for name, values in row.items()}).logits
        alone = super(DoubleHeadsModel, model).forward(input_ids=torch.tensor([context + reply])).logits[0, 5:8].float()
        agrees = torch.allclose(packed, alone, rtol=0, atol=ROUNDING * alone.std().item() + 1e-6)
        reason = "the logits of a packed candidate differ from those of the candidate alone"
    except KeyError as kind:
        reason = f"it has layers of {kind}"
    except Exception as error:  # model families fail in many ways
        reason = str(error).strip().split("\n")[0][:160]
    if getattr(config, "alibi", not hasattr(config, "max_position_embeddings")) or \
            "local" in getattr(config, "attention_layers", ()):  # GPT-Neo's window is longer than this row
        agrees, reason = False, "it counts distances in the row"
    if not agrees:
        raise InputError(f"--model_checkpoint {checkpoint}: a '{config.model_type}' model cannot read a turn as one "
                         f"row ({reason}); choose a decoder with positions: llama, qwen3, gpt_neox, opt, …")


def _adapted(checkpoint: str, base: str, rank: int) -> DoubleHeadsModel:
    """Load the base model of an adapter, and merge the adapter into it.

    An adapter of the rank ``rank`` is not merged; the model is then as after `add_lora_`.
    """
    folders = [os.path.realpath(checkpoint)]
    try:
        while next_base := adapter_base(folders[-1]):
            folders.append(os.path.realpath(resolve_checkpoint(next_base)))
            if folders.count(folders[-1]) > 1:
                raise InputError("its adapter_config.json names itself as the base model; enter the base model there")
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
    except Exception as error:  # peft and torch raise many types
        reason = str(error).strip().split("\n")[0][:160]
        raise InputError(f"--model_checkpoint {checkpoint}: its adapter does not fit {base} ({reason}); "
                         "fetch or train it again") from None
    return model.eval()


def _as_trained_(model: DoubleHeadsModel, config) -> None:
    """Copy the settings of training (history, persona, token types, data) from an adapter's config to its base."""
    how_it_was_trained = {"history_start", "max_history", "max_len", "no_persona", "no_token_types", "speaker_ids",
                          "trained_on"}
    for name in how_it_was_trained & vars(config).keys():
        setattr(model.config, name, getattr(config, name))


@torch.no_grad()
def _of_training(checkpoint: str) -> DoubleHeadsModel:
    """Load the model of a run's checkpoint file; an adapter is merged into it."""
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
            model_class: Any = MODELS.get(config.model_type) or decoder_class(type(config))  # type: ignore[arg-type]
            model = model_class(model_class.config_class.from_dict(config.to_dict() | {"dtype": "float32"}))
        weights = distinct_tensors(model)
        if weights.keys() != state.keys():
            raise ValueError("its weights do not match its configuration")
        for name, weight in weights.items():
            weight.copy_(state[name])
    except (SafetensorError, OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"--model_checkpoint {checkpoint}: its model cannot be loaded ({short(str(error))}); continue "
                         f"with train.py --resume {path.parents[1]} instead") from None
    if adapted:
        with TemporaryDirectory() as folder:
            save_model(model, folder)
            return load_model(folder)
    model.generation_config = GenerationConfig()
    _check_row(model.eval(), checkpoint)
    return model


SPARE_ROWS = 1024  # unused embeddings, at most: vocabularies are padded to round numbers, Phi-2's by 905


def add_special_tokens_(model: DoubleHeadsModel, tokenizer: Tokenizer) -> None:
    """Add the tokenizer's control tokens to the model's vocabulary, in place, with random embeddings.

    Raises `InputError` if the sizes of the two vocabularies do not fit together.
    """
    tokenizer.add_special_tokens(ATTR_TO_SPECIAL_TOKEN)
    have, want = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if not want - len(SPECIAL_TOKENS) <= have <= want + SPARE_ROWS:
        raise InputError(f"--model_checkpoint: the model knows {have:,} tokens and its tokenizer {want:,} (control "
                         "tokens included); put the files of the model's own tokenizer into its folder")
    if have < want:
        model.resize_token_embeddings(want, mean_resizing=False)
    if (last := max(tokenizer.get_vocab().values())) >= max(have, want):
        raise InputError(f"--model_checkpoint: the model knows {max(have, want):,} tokens, its tokenizer's ids go to "
                         f"{last:,}; put the files of the model's own tokenizer into its folder")
    model.config.speaker_ids = tokenizer.convert_tokens_to_ids(ATTR_TO_SPECIAL_TOKEN["additional_special_tokens"])


def add_lora_(model: DoubleHeadsModel, tokenizer: Tokenizer, rank: int, model_checkpoint: str) -> None:
    """Freeze the model, in place, and add trainable low-rank updates to its linear layers (Hu et al. 2021).

    The choice head, the token types and the embeddings of the control tokens stay trainable as a whole.
    ``model_checkpoint``: the checkpoint that the model was loaded from; the adapter names it as its base. A model that
    was loaded with an adapter of this rank is left unchanged. Raises `InputError` if the checkpoint has no weights.
    """
    if getattr(model, "peft_config", None):
        return
    base = resolve_checkpoint(model_checkpoint)
    if os.path.isdir(base) and not adapter_base(base) and not _weight_files(base):
        raise InputError(f"--lora: {base} has no weights, and an adapter of random weights could not be loaded later; "
                         "train without --lora, or name a model with weights")
    named = model_checkpoint in NAMED or not os.path.exists(base)  # names work on other machines too
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
    """Make the adapter's layers `LowRankLinear`, and log the number of trained parameters."""
    for layer in model.modules():
        if type(layer) is lora.Linear:
            layer.__class__ = LowRankLinear
    model.train(model.training)  # the new layers too
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info("LoRA of rank %s: %s parameters are trained", model.peft_config["default"].r, f"{trained:,}")


def linear_layers(model: DoubleHeadsModel) -> list[nn.Module]:
    """Return the linear layers of the model's blocks, without the heads."""
    return [module for module in model.base_model.modules() if isinstance(module, nn.Linear | Conv1D)]


def save_model(model: DoubleHeadsModel, folder: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write ``model.safetensors`` and ``config.json`` for plain transformers, each file completely or not at all.

    Modules that the plain architecture lacks are written to ``double_heads.safetensors``. After `add_lora_` only the
    adapter, in PEFT's format, and ``config.json`` are written. ``state``: the whole weights by name, needed if the
    model holds only a part of each (``--shard``). Weights are saved in float32.
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
            file = heads if name.split(".")[0] in model.extra_modules else weights
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
                        help="write the adapter itself in bfloat16, half the size, to share it")
    args = parser.parse_args()
    run = resolve_checkpoint(args.run)
    if not adapter_base(run):
        raise InputError(f"{args.run}: has no adapter_config.json, so there is nothing to merge; name a run of "
                         "train.py --lora")
    model, tokenizer = load_model(run), get_tokenizer(run)
    add_special_tokens_(model, tokenizer)
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(tokenizer, args.folder)
        if args.adapter:
            shutil.copy(Path(run, "adapter_config.json"), args.folder)
            model.config.__dict__.pop("trained_on", None)  # it names a file on this machine
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
