"""Open the data set that a script's flags name, and offer the flags that scripts share.

The names of 2019 that live elsewhere now can be imported from here as well.
"""

import hashlib
import logging
import os
import socket
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
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
MOST_UNKNOWN = 0.03  # of a data set's tokens; of English dialogs GPT-1 knows all but one in a thousand
logger = logging.getLogger(__name__)


def get_dataset(tokenizer: Tokenizer, dataset_path: str, dataset_cache: str, dataset: str = "", data_dir: str = "data",
                target: str = "both", distractors: str = "none", train_frac: float | None = None,
                keep_repeated: bool = False, layout: str = "", columns: str = "") -> TokenTable:
    """The tokenised data set of a path, an address, or ``""`` for PERSONA-CHAT; read from the cache if it is there.

    ``dataset``: instead of a path, names of `RELEASES` with commas between, the mix of which is looked for under
    ``data_dir`` (`find_corpus`). ``target``: whose turns, of `TARGETS`; ``distractors``: how they are drawn, of `HOW`,
    for turns that bring none; ``train_frac``: divide training and validation dialogs anew, that share for training;
    ``keep_repeated``: train on dialogs that a later split repeats, too; ``layout`` and ``columns`` as for `read_any`.

    The cache file's name starts with ``dataset_cache`` and ends in a key made of the data's hash and these choices, the
    tokenizer's fingerprint and the format's version, so a stale or foreign file is never taken for ours. One process
    builds it, the others wait. Raises `InputError` as the readers and `download` do, or when the cache cannot be
    written.
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
        place_is_fixed = cache.exists() and not os.access(cache.parent, os.W_OK)  # where no lock can be, nor is needed
        with nullcontext() if place_is_fixed else FileLock(f"{cache}.lock"):
            if table := open_table(cache, key):
                logger.info("Token table read from %s", cache)
                _say_unknown(table, tokenizer)
                return table
            logger.info("Tokenising %s", ", ".join(map(str, files)))
            parts = [read_release(*found) for found in corpora] if dataset else [read_any(files[0], layout, columns)]
            splits = combine_corpora(parts, dataset or dataset_path, target, train_frac, keep_repeated=keep_repeated)
            build_table(tokenizer, splits, distractors, cache, key)
        logger.info("Token table written to %s", cache)
    except OSError as error:
        raise InputError(f"--dataset_cache {dataset_cache}: cannot be written ({error.strerror or error}); "
                         "name a place with room that can be written to") from None
    table = TokenTable(cache)
    _say_unknown(table, tokenizer)
    return table


def _say_unknown(table: TokenTable, tokenizer: Tokenizer) -> None:
    """Say what share of the texts' tokens the tokenizer does not know, and above `MOST_UNKNOWN` what to do about it."""
    tokens = table.array("tokens")
    if tokenizer.unk_token_id is None or not len(tokens):
        return
    unknown = float((tokens == tokenizer.unk_token_id).mean())
    if unknown <= MOST_UNKNOWN:
        logger.info("%.3g %% of the texts' tokens are unknown to the tokenizer", 100 * unknown)
    else:
        logger.warning("%.3g %% of the texts' tokens are unknown to the tokenizer: the model reads and learns %s in "
                       "their place; take a model that spells this language, such as --model_checkpoint gpt2 or one "
                       "made for it (GPT-1's tokenizer reads English alone)", 100 * unknown, tokenizer.unk_token)


def _hash(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError:
        read_corpus(path)  # says what is wrong with the path
        raise


# The flags by which a run remembers its data, with their defaults.
DATA_FLAGS = {"dataset_path": "", "dataset": "", "data_dir": "data", "target": "both", "train_frac": None,
              "keep_repeated": False, "format": "", "columns": ""}


def data_flags(args: Namespace) -> dict:
    """What a run's config says of its data, ``trained_on``: the flags that are not as they are by default.

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
    """The data set that the flags of `add_common_flags` name.

    If they name none, and with ``of_run``, it is the one that ``--model_checkpoint`` was trained on, as far as its
    config says so; ``args`` then says it, too. Flags that are not as by default override what is remembered. Raises
    `InputError` when it is not there any more.
    """
    if from_run and not args.dataset_path and not args.dataset:
        for name, value in _trained_on(resolve_checkpoint(args.model_checkpoint)).items():
            if getattr(args, name) == DATA_FLAGS[name]:
                setattr(args, name, value)
        if args.dataset_path or args.dataset:
            logger.info("The data is what the run was trained on, %s", args.dataset or args.dataset_path)
    return get_dataset(tokenizer, args.dataset_path, args.dataset_cache, args.dataset, args.data_dir, args.target,
                       args.distractors, args.train_frac, args.keep_repeated, args.format, args.columns)


def _trained_on(checkpoint: str) -> dict:
    """What a run's config says of its data. Other people's configs may say anything."""
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
        raise InputError(f"--model_checkpoint {checkpoint}: was trained on what {short(path)} had; {cure}")
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
    raise InputError(f"runs/{stamp}: taken a hundred times over; try again in a second")


def add_common_flags(parser: ArgumentParser, model_checkpoint: str) -> None:
    """The flags every script has: data, checkpoint, history, device. ``model_checkpoint`` is that flag's default."""
    parser.add_argument("--dataset_path", default="", metavar="FILE",
                        help="the data: a file or folder that example_entry.py checks or converts, or a .json file's "
                             "address (default: what the run was trained on; in training the published PERSONA-CHAT)")
    parser.add_argument("--dataset", type=_corpus_names, nargs="?", const="list", default="", metavar="NAME,NAME",
                        help=f"published corpora instead, mixed: {', '.join(RELEASES)}; without a name: list them with "
                             "size and licence")
    parser.add_argument("--data_dir", default="data", metavar="FOLDER",
                        help="where their releases are, unpacked or not, or else are downloaded to a cache from where "
                             "they are published (default: %(default)s)")
    add_reading_flags(parser)
    parser.add_argument("--dataset_cache", default="./dataset_cache", metavar="PREFIX",
                        help="where the tokenised data is kept: how the file's name begins (default: %(default)s)")
    parser.add_argument("--model_checkpoint", default=model_checkpoint, metavar="CHECKPOINT",
                        help="a run folder; `persona`, the bot that comes with this project; `smollm2`, its pretrained "
                             "base; a hub name; a GGUF file; a folder with a model's config and tokenizer; or "
                             "a .tar.gz of one or its address (default: "
                             f"{model_checkpoint or 'the published model of 2019'})")
    parser.add_argument("--max_history", type=whole_number, metavar="N",
                        help="exchanges the model sees: 2N+1 utterances (default: as in the run's training; 2)")
    parser.add_argument("--max_turns", type=_odd, dest="max_history", default=SUPPRESS, metavar="N",
                        help="the same in utterances: N, an odd number")
    parser.add_argument("--max_len", type=_positions, default=0, metavar="N",
                        help="tokens that the model sees at once, context and reply (default: as in its training, "
                             "there as many as it is made for)")
    add_device_flag(parser)


def add_device_flag(parser: ArgumentParser) -> None:
    """``--device``, alone."""
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda, cuda:1, … (default: cuda if there is one, else cpu)")


def _odd(text: str) -> int:
    """Utterances, for argparse; as exchanges."""
    if (number := positive_number(text)) % 2 == 0:
        raise ArgumentTypeError(f"{text!r} is even, and would begin with the bot's own words; give an odd number")
    return number // 2


def _positions(text: str) -> int:
    """Tokens of a row, for argparse."""
    if (number := positive_number(text)) < 32:
        raise ArgumentTypeError(f"{text!r} leaves no room for a dialog; give 32 or more")
    return number


def _corpus_names(text: str) -> str:
    """Names of published corpora with commas between, for argparse; "list" prints what there is, and ends."""
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
