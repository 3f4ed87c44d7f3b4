"""Build and read the token table, a tokenised data set in one file.

This file knows entries and a tokenizer, but not where they come from.
"""

import json
import logging
import multiprocessing
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from cli import short
from dialogs import DialogNumbers
from distractors import PER_TURN, draw_distractors
from files import hash_tensors, write_tensors
from tokenization import Tokenizer

Index = Any  # a whole number of Python's or numpy's
logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------- token table


class TokenTable(Mapping[str, "Split"]):
    """A tokenised data set: each distinct string once, and the dialogs as index arrays into those strings.

    A mapping from split names to `Split`. All arrays lie in one safetensors file that is memory-mapped, so opening
    it reads next to nothing and several processes share one copy. Arrays: ``text``/``text_offsets`` (UTF-8 bytes)
    and ``tokens``/``token_offsets``, ragged over strings; for each split ``persona``/``persona_offsets`` ragged over
    dialogs, ``history``/``history_offsets`` and ``candidates``/``candidates_offsets`` ragged over turns, and
    ``turn_dialog`` (turns,).
    """

    FORMAT = "4"

    def __init__(self, path: str | Path):
        """Open the file. Raises ``SafetensorError`` or ``OSError`` when it is damaged or missing."""
        with safe_open(path, framework="pt") as file:
            self.metadata = file.metadata() or {}
            self._arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}
        self._splits = {name: Split(self, name) for name in json.loads(self.metadata.get("splits", "[]"))}

    def is_intact(self) -> bool:
        """Return whether the arrays have the hash that was written with them."""
        return self.metadata.get("digest") == _digest(self._arrays)

    def __getitem__(self, split: str) -> "Split":
        return self._splits[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)

    def array(self, name: str) -> np.ndarray:
        """Return a whole stored array; see the class for the names."""
        return self._arrays[name]

    def tokens(self, string: int) -> np.ndarray:
        """Return the token ids of a string, (tokens,) int32."""
        return self._ragged("tokens", "token_offsets", string)

    def text(self, string: int) -> str:
        """Return a string as it is in the data file."""
        return self._ragged("text", "text_offsets", string).tobytes().decode()

    def _ragged(self, values: str, offsets: str, row: int) -> np.ndarray:
        bounds = self._arrays[offsets]
        return self._arrays[values][bounds[row]:bounds[row + 1]]


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    return hash_tensors((name, torch.from_numpy(arrays[name])) for name in sorted(arrays))


class Split(Sequence[dict]):
    """One split of a `TokenTable`, a sequence of dialogs as nested lists of token ids, as code of 2019 expects."""

    def __init__(self, table: TokenTable, name: str):
        self.table, self.name = table, name
        self.turn_dialog = table.array(f"{name}.turn_dialog")  # (turns,): the index of each turn's dialog, ascending

    def __len__(self) -> int:
        return len(self.table.array(f"{self.name}.persona_offsets")) - 1

    @property
    def num_turns(self) -> int:
        return len(self.turn_dialog)

    def strings(self, field: str, row: Index) -> np.ndarray:
        """Return the string numbers of a dialog's ``persona``, or of a turn's ``history`` or ``candidates``."""
        return self.table._ragged(f"{self.name}.{field}", f"{self.name}.{field}_offsets", row)

    def texts(self, field: str, row: Index) -> list[str]:
        """Return these strings as text."""
        return [self.table.text(string) for string in self.strings(field, row)]

    def token_ids(self, field: str, row: Index) -> list[list[int]]:
        """Return the token ids of these strings."""
        return [self.table.tokens(string).tolist() for string in self.strings(field, row)]

    def __getitem__(self, dialog):  # type: ignore[override]  # no slices
        if not -len(self) <= dialog < len(self):
            raise IndexError(dialog)
        dialog %= len(self)
        first, last = (int(np.searchsorted(self.turn_dialog, bound)) for bound in (dialog, dialog + 1))
        turns = [{field: self.token_ids(field, turn) for field in ("history", "candidates")}
                 for turn in range(first, last)]
        return {"personality": self.token_ids("persona", dialog), "utterances": turns}


def open_table(cache: Path, key: str) -> TokenTable | None:
    """Open the table at ``cache``; return None if it is missing or damaged or has another key."""
    if not cache.exists():
        return None
    try:
        table = TokenTable(cache)
        if table.metadata.get("key") == key and table.is_intact():
            return table
        logger.warning("%s is not a token table of this data, or has been changed; building it again", cache)
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        logger.warning("%s is damaged (%s); building it again", cache, short(str(error)))
    return None


class _Ragged:
    """Rows of unequal length, stored one after the other with their offsets, as compact as on the disk."""

    def __init__(self, typecode: str):
        self.values, self.offsets = array(typecode), array("q", [0])

    def append(self, row: Iterable[int]) -> None:
        self.values.extend(row)
        self.offsets.append(len(self.values))

    def __getitem__(self, row: int) -> array:
        return self.values[self.offsets[row]:self.offsets[row + 1]]

    def arrays(self, name: str, offsets: str) -> dict[str, np.ndarray]:
        """Return the values, (values,) of the type code's type, and the offsets, (rows + 1,) int64."""
        return {name: np.frombuffer(self.values, self.values.typecode), offsets: np.frombuffer(self.offsets, np.int64)}


def build_table(tokenizer: Tokenizer, splits: Mapping[str, Iterable[dict]], distractors: str, cache: Path,
                key: str) -> None:
    """Tokenise each distinct string of the entries once and write the table, completely or not at all.

    Entries are read one by one and not kept; per occurrence of a string the memory holds only its number.
    """
    # String → number, in order of first appearance. Personas have their own numbers: their tokens can differ.
    said: dict[str, int] = {}
    personas: dict[str, int] = {}

    def number(sentences: list[str], numbers: dict[str, int]) -> list[int]:
        return [numbers.setdefault(sentence, len(numbers)) for sentence in sentences]

    arrays, dialogs = {}, {}
    for split, entries in splits.items():
        known, of_entry = DialogNumbers(), array("q")
        fields, turn_dialog = {name: _Ragged("i") for name in ("persona", "history", "candidates")}, array("i")
        for dialog, entry in enumerate(tqdm(entries, desc=f"Reading {split}", unit=" entries", delay=1)):
            of_entry.append(known.number(entry) if distractors != "none" else 0)
            fields["persona"].append(number(entry.get("personality", []), personas))
            for turn in entry["utterances"]:
                fields["history"].append(number(turn["history"], said))
                fields["candidates"].append(number(turn["candidates"], said))
                turn_dialog.append(dialog)
        for field, ragged in fields.items():
            arrays |= ragged.arrays(f"{split}.{field}", f"{split}.{field}_offsets")
        arrays[f"{split}.turn_dialog"] = np.frombuffer(turn_dialog, np.int32)
        if distractors != "none":  # the dialog of each turn; its other side and its repetitions have the same number
            dialogs[split] = known.representatives()[np.frombuffer(of_entry, np.int64)[turn_dialog]]
    for split in splits:
        arrays[f"{split}.persona"] = arrays[f"{split}.persona"] + np.int32(len(said))
    strings = [*said, *personas]
    tokens, texts = _Ragged("i"), _Ragged("B")
    with tqdm(total=len(strings), desc="Tokenising", unit=" strings") as progress:
        for chunk in chain(_tokenize_in_parallel(tokenizer, strings[:len(said)]),
                           _tokenize_in_parallel(tokenizer, strings[len(said):], tokenize_persona)):
            for ids in chunk:
                tokens.append(ids)
            progress.update(len(chunk))
    for string in strings:
        texts.append(string.encode("utf-8", "replace"))
    for split, of_turn in dialogs.items():
        _add_distractors(arrays, split, strings, tokens, of_turn, distractors)
    arrays |= tokens.arrays("tokens", "token_offsets") | texts.arrays("text", "text_offsets")
    tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
    write_tensors(tensors, cache, {"key": key, "splits": json.dumps(list(splits)), "digest": _digest(arrays)})


def _add_distractors(arrays: dict[str, np.ndarray], split: str, strings: list[str], tokens: _Ragged,
                     dialogs: np.ndarray, method: str) -> None:
    """Insert distractors, the hardest last, before the gold reply of every turn without other candidates, in place.

    ``dialogs`` (turns,): the number of each turn's dialog. The hardest are last because training uses the last
    candidates of a turn.
    """
    candidates, offsets = arrays[f"{split}.candidates"], arrays[f"{split}.candidates_offsets"]
    counts, golds = np.diff(offsets), candidates[offsets[1:] - 1]
    if not (counts == 1).any():
        return
    drawn = np.full((len(golds), PER_TURN), -1)
    ids = {number: tuple(tokens[number]) for number in np.unique(golds).tolist()}
    drawn[counts == 1] = draw_distractors(golds, dialogs, strings, method, turns=np.flatnonzero(counts == 1),
                                          tokens=ids)[:, ::-1]
    added = (drawn >= 0).sum(1)
    logger.info("%s: %s turns have no distractors; replies of other dialogs are drawn (%s)", split,
                f"{(counts == 1).sum():,}", method)
    new = np.append(0, np.cumsum(counts + added))
    values = np.empty(new[-1], np.int32)
    own = np.arange(len(candidates)) + np.repeat(np.cumsum(added), counts)
    values[own] = candidates
    is_new = np.ones(len(values), bool)
    is_new[own] = False
    values[is_new] = drawn[drawn >= 0]
    arrays[f"{split}.candidates"], arrays[f"{split}.candidates_offsets"] = values, new


# -------------------------------------------------------------------------------------------------- tokenising


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each utterance; no text becomes a control token."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []


def tokenize_persona(tokenizer: Tokenizer, sentences: list[str]) -> list[list[int]]:
    """Return the token ids of each sentence of a persona; `tokenize` is for utterances."""
    return tokenizer.encode_persona(sentences)


def _tokenize_in_parallel(tokenizer: Tokenizer, texts: list[str], function: Callable = tokenize,
                          chunk: int = 4096) -> Iterator[list[list[int]]]:
    """Apply ``function`` to chunks of ``texts``, in order; if they are many, with one process per core."""
    chunks = (texts[start:start + chunk] for start in range(0, len(texts), chunk))
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
                  len(texts) // (4 * chunk))
    if workers < 2:
        yield from (function(tokenizer, texts) for texts in chunks)
        return
    with multiprocessing.Pool(workers, _start_worker, (partial(function, tokenizer),)) as pool:
        yield from pool.imap(_tokenize_chunk, chunks)


_tokenize_in_worker = None


def _start_worker(tokenize: Callable) -> None:
    global _tokenize_in_worker
    _tokenize_in_worker = tokenize
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork, and all cores are busy anyway


def _tokenize_chunk(texts: list[str]) -> list[list[int]]:
    return _tokenize_in_worker(texts)
