"""Define the flags that all scripts share, and open the data set that they name.

The names of 2019 that have moved to other files can still be imported from here.
"""

import hashlib
import logging
import os
import socket
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

import torch
from filelock import FileLock

from cli import InputError, fraction, positive_number, short, whole_number
from corpora import read_corpus
from dialogs import TARGETS, combine_corpora
from downloads import download, find_corpus
from files import hash_file
from pretrained import (
    HF_FINETUNED_MODEL,
    download_pretrained_model,
    is_gguf,
    read_config,
    resolve_checkpoint,
)
from readers import add_reading_flags, format_name, read_any
from releases import RELEASES, corpus_name, describe_corpora, read_release
from tables import TokenTable, build_table, open_table
from tokenization import Tokenizer, fingerprint

__all__ = ["HF_FINETUNED_MODEL", "PERSONACHAT_URL", "download_pretrained_model", "get_dataset", "make_logdir"]

PERSONACHAT_URL = RELEASES["personachat"][0].address
MOST_UNKNOWN = 0.03  # the share of unknown tokens above which there is a warning; 0.001 for GPT-1 on English dialogs
logger = logging.getLogger(__name__)


def get_dataset(tokenizer: Tokenizer, dataset_path: str, dataset_cache: str, dataset: str = "", data_dir: str = "data",
                target: str = "both", distractors: str = "none", train_frac: float | None = None,
                keep_repeated: bool = False, layout: str = "", columns: str = "") -> TokenTable:
    """Read and tokenise a data set, or open its token table in the cache.

    ``dataset_path``: a file, a folder or an address; ``""`` is PERSONA-CHAT. ``dataset``: instead of a path, names in
    `RELEASES`, separated by commas, of corpora to mix; they are looked for under ``data_dir`` (`find_corpus`).
    ``target``, ``train_frac``, ``keep_repeated``: see `combine_corpora`. ``distractors``: the method, one of
    `distractors.METHODS`, by which turns without distractors get some. ``layout``, ``columns``: see `read_any`.

    The name of the cache file begins with ``dataset_cache`` and ends with a key, made from the hash of the data, these
    choices, the tokenizer's fingerprint and the format's version, so that a stale or foreign file is never used. One
    process builds the table while others wait. Raises `InputError` like the readers and `download`, and when the cache
    cannot be written.
    """
    if dataset:
        corpora = [find_corpus(name, data_dir) for name in dataset.split(",")]
        files = [path for _, found in corpora for paths in found.values() for path in paths]
    else:
        dataset_path = dataset_path or PERSONACHAT_URL
        files = [download(dataset_path) if dataset_path.startswith(("http://", "https://")) else Path(dataset_path)]
    choices = [dataset, target, distractors, str(train_frac), str(keep_repeated), layout, columns]
    parts_of_key = [TokenTable.FORMAT, *map(_hash, files), fingerprint(tokenizer), *choices]
    key = hashlib.sha256("\n".join(parts_of_key).encode()).hexdigest()
    cache = Path(f"{dataset_cache}_{type(tokenizer).__name__}_{key[:16]}.safetensors")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        read_only = cache.exists() and not os.access(cache.parent, os.W_OK)  # then a lock is impossible and not needed
        with nullcontext() if read_only else FileLock(f"{cache}.lock"):
            if table := open_table(cache, key):
                logger.info("Token table read from %s", cache)
                _report_unknown_tokens(table, tokenizer)
                return table
            logger.info("Tokenising %s", ", ".join(map(str, files)))
            parts = [read_release(*found) for found in corpora] if dataset else [read_any(files[0], layout, columns)]
            splits = combine_corpora(parts, dataset or dataset_path, target, train_frac, keep_repeated=keep_repeated)
            build_table(tokenizer, splits, distractors, cache, key)
        logger.info("Token table written to %s", cache)
    except OSError as error:
        raise InputError(f"--dataset_cache {dataset_cache}: cannot be written ({error.strerror or error}); "
                         "name a path that you may write, on a disk with free space") from None
    table = TokenTable(cache)
    _report_unknown_tokens(table, tokenizer)
    return table


def _report_unknown_tokens(table: TokenTable, tokenizer: Tokenizer) -> None:
    """Log the share of tokens that the tokenizer does not know, above `MOST_UNKNOWN` as a warning with the cure."""
    tokens = table.array("tokens")
    if tokenizer.unk_token_id is None or not len(tokens):
        return
    unknown = float((tokens == tokenizer.unk_token_id).mean())
    if unknown <= MOST_UNKNOWN:
        logger.info("%.3g %% of the texts' tokens are unknown to the tokenizer", 100 * unknown)
    else:
        logger.warning("%.3g %% of the texts' tokens are unknown to the tokenizer: the model reads and learns %s in "
                       "their place; take a model that spells this language, such as --model_checkpoint gpt2 or one "
                       "made for it (GPT-1's tokenizer reads only English)", 100 * unknown, tokenizer.unk_token)


def _hash(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError:
        read_corpus(path)  # raises an error that explains the path
        raise


# The flags by which a run remembers its data, with their defaults.
DATA_FLAGS = {"dataset_path": "", "dataset": "", "data_dir": "data", "target": "both", "train_frac": None,
              "keep_repeated": False, "format": "", "columns": ""}


def data_flags(args: Namespace) -> dict:
    """Return the data flags that differ from their defaults, for ``trained_on`` in a run's ``config.json``.

    Files and folders are named by their whole paths, so that they are found from wherever the run is used.
    """
    flags = {name: getattr(args, name) for name in DATA_FLAGS}
    if flags["dataset"]:
        flags["data_dir"] = os.path.abspath(flags["data_dir"])
    else:
        del flags["data_dir"]
    if flags["dataset_path"] and not flags["dataset_path"].startswith(("http://", "https://")):
        flags["dataset_path"] = os.path.abspath(flags["dataset_path"])
    return {name: value for name, value in flags.items() if value != DATA_FLAGS[name]}


def open_dataset(args: Namespace, tokenizer: Tokenizer, from_run: bool = True) -> TokenTable:
    """Open the data set that the flags of `add_common_flags` name.

    If they name none and ``from_run`` is true, open the data on which ``--model_checkpoint`` was trained, as its config
    records it, and set the flags in ``args`` to it; flags that differ from their defaults override the record. Raises
    `InputError` when the recorded data is missing.
    """
    if from_run and not args.dataset_path and not args.dataset:
        for name, value in _trained_on(resolve_checkpoint(args.model_checkpoint)).items():
            if getattr(args, name) == DATA_FLAGS[name]:
                setattr(args, name, value)
        if args.dataset_path or args.dataset:
            logger.info("The data is what the run was trained on, %s", args.dataset or args.dataset_path)
    return get_dataset(tokenizer, args.dataset_path, args.dataset_cache, args.dataset, args.data_dir, args.target,
                       args.distractors, args.train_frac, args.keep_repeated, args.format, args.columns)


def other_data(args: Namespace) -> str:
    """Return a sentence for people if the flags name other data than the run was trained on, otherwise "".

    The result is also "" if the run's config does not name its data.
    """
    try:
        trained = _trained_on(resolve_checkpoint(args.model_checkpoint))
    except InputError:  # the run's data is missing
        return ""
    first, second = ((data.get("dataset") or data.get("dataset_path") or "") for data in (trained, vars(args)))
    if not first or not second or os.path.realpath(first) == os.path.realpath(second):
        return ""
    return f"The model was trained on {short(first)}; the personalities here come from {short(second)}."


def _trained_on(checkpoint: str) -> dict:
    """Return the data flags in a run's config. Raises `InputError` for values that name no data."""
    if not os.path.exists(checkpoint) or is_gguf(checkpoint):
        return {}
    flags = getattr(read_config(checkpoint), "trained_on", None) or {}
    cure = "say which data with --dataset_path or --dataset"
    allowed = {"target": TARGETS.__contains__, "train_frac": fraction.__contains__,
               "format": lambda value: format_name(value) == value,
               "dataset": lambda value: value != "list" and _corpus_names(value) == value}
    try:
        for name, value in flags.items():
            kind = float if name == "train_frac" else type(DATA_FLAGS[name])
            if type(value) is not kind or not allowed.get(name, lambda value: True)(value):
                raise ValueError
    except (ValueError, KeyError, AttributeError, ArgumentTypeError):
        raise InputError(f"--model_checkpoint {checkpoint}: its config.json has a trained_on that names no data; "
                         f"{cure}") from None
    path = flags.get("dataset_path", "")
    if path and "://" not in path:  # a model that is passed on with its data names them from its own folder
        path = flags["dataset_path"] = os.path.normpath(os.path.join(checkpoint, path))
    if path.startswith(("http://", "https://")):  # not for a config to decide
        raise InputError(f"--model_checkpoint {checkpoint}: was trained on the file at {short(path)}; {cure}")
    if path and not os.path.exists(path):
        raise InputError(f"--model_checkpoint {checkpoint}: was trained on {short(path)}, which is not here; "
                         f"{cure}, or chat with --personality")
    return flags


def make_logdir(model_name: str) -> str:
    """Create and return a new run folder, ``runs/Apr17_13-31-38_host_openai-gpt``."""
    stamp = f"{datetime.now():%b%d_%H-%M-%S}_{socket.gethostname()}_{Path(model_name).name}"
    for attempt in range(1, 100):  # two runs may start in the same second
        folder = Path("runs", stamp if attempt == 1 else f"{stamp}_{attempt}")
        try:
            folder.mkdir(parents=True)
            return str(folder)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"{folder}: cannot be made ({error.strerror}); "
                             "start from a folder you may write to") from None
    raise InputError(f"runs/{stamp}: exists a hundred times already; try again in a second")


def add_common_flags(parser: ArgumentParser, model_checkpoint: str) -> None:
    """Add the flags that all scripts have: model, history, device and data. ``model_checkpoint``: its default."""
    add = parser.add_argument_group("model").add_argument
    add("--model_checkpoint", default=model_checkpoint, metavar="CHECKPOINT",
        help="a run folder; `persona`, the bot of this project; `smollm2`, its pretrained base; a hub "
             "name; a GGUF file; a folder with a model's config and tokenizer, for random weights; or "
             "a .tar.gz of a folder or its address (default: "
             f"{model_checkpoint or 'the published model of 2019'})")
    add("--max_history", type=whole_number, metavar="N",
        help="exchanges that the model sees, 2N+1 utterances (default: as in its training, or 2)")
    add("--max_turns", type=_odd, dest="max_history", default=SUPPRESS, metavar="N",
        help="the same in utterances; N is odd")
    add("--max_len", type=_positions, default=0, metavar="N",
        help="tokens of context and reply that the model sees at once (default: as in its training; "
             "for training, its maximum)")
    add_device_flag(add)
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--dataset_path", default="", metavar="FILE",
        help="the data: a file or folder that example_entry.py checks or converts, or the address of "
             "a .json file (default: the data of the run's training; for training, the published "
             "PERSONA-CHAT)")
    add("--dataset", type=_corpus_names, nargs="?", const="list", default="", metavar="NAME,NAME",
        help=f"published corpora, mixed, instead of a file: {', '.join(RELEASES)}; without a name, "
             "list them with size and licence")
    add("--data_dir", default="data", metavar="FOLDER",
        help="folder with their releases, unpacked or not; missing ones are downloaded to a cache "
             "(default: %(default)s)")
    add("--dataset_cache", default="./dataset_cache", metavar="PREFIX",
        help="beginning of the path of the file with the tokenised data (default: %(default)s)")
    add_reading_flags(data)


def add_device_flag(add: Callable) -> None:
    """Add ``--device``; ``add``: the ``add_argument`` of a parser or of a group of flags."""
    add("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, … (default: cuda if there is a GPU, otherwise cpu)")


def _odd(text: str) -> int:
    """Convert an odd number of utterances to exchanges; a ``type`` for argparse."""
    if (number := positive_number(text)) % 2 == 0:
        raise ArgumentTypeError(f"{text!r} is even, and would begin with the bot's own words; give an odd number")
    return number // 2


def _positions(text: str) -> int:
    """Convert a number of tokens per row; a ``type`` for argparse."""
    if (number := positive_number(text)) < 32:
        raise ArgumentTypeError(f"{text!r} leaves no room for a dialog; give 32 or more")
    return number


def _corpus_names(text: str) -> str:
    """Check names of corpora, separated by commas; "list" prints all and ends the script. A ``type`` for argparse."""
    if text == "list":
        print(describe_corpora())
        raise SystemExit(0)
    names = [(name, corpus_name(name)) for name in text.split(",")] if text else []
    if unknown := [name.strip() for name, known in names if not known]:
        raise ArgumentTypeError(f"no corpus is called {unknown[0]!r}; known are {', '.join(RELEASES)}")
    return ",".join(dict.fromkeys(known for _, known in names))


def _device(text: str) -> str:
    try:
        torch.ones(1, device=text).item()  # "meta" holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentTypeError(f"{text!r} cannot be used here ({short(str(error))}); try cpu") from None
    return text
