"""Turn text into token ids and back: the tokenizers of GPT-1, GPT-2 and other decoders, with five control tokens."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import transformers
from tokenizers import pre_tokenizers

from cli import InputError, short
from files import disk_error
from pretrained import from_file, is_checkpoint_file, quiet_transformers, read_config, resolve_checkpoint

# The five control tokens, appended to a pretrained vocabulary in the order of ATTR_TO_SPECIAL_TOKEN.
SPECIAL_TOKENS = ["<bos>", "<eos>", "<speaker1>", "<speaker2>", "<pad>"]
ATTR_TO_SPECIAL_TOKEN = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "additional_special_tokens": ["<speaker1>", "<speaker2>"],
}


BYTE = re.compile("<0x[0-9A-F]{2}>")  # what some tokenizers spell rare letters with


class Tokenizer(Protocol):
    """What the project uses of a tokenizer: part of what transformers' have, and two methods of `_Prepared`."""

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    unk_token_id: int | None
    unk_token: str | None
    all_special_ids: list[int]
    backend_tokenizer: Any
    added_tokens_decoder: dict[int, Any]
    chat_template: str | None
    control: frozenset[int]

    def __call__(self, text: str | list[str], **kwargs) -> Any: ...
    def __len__(self) -> int: ...
    def encode(self, text: str, **kwargs) -> list[int]: ...
    def decode(self, token_ids: int | Sequence[int], **kwargs) -> Any: ...
    def get_vocab(self) -> dict[str, int]: ...
    def convert_ids_to_tokens(self, ids: Any) -> Any: ...
    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any: ...
    def add_special_tokens(self, special_tokens_dict: dict) -> int: ...
    def save_pretrained(self, save_directory: Any) -> Any: ...
    def encode_persona(self, sentences: Sequence[str]) -> list[list[int]]: ...
    def first_piece(self, word: str, after_space: bool) -> int | None: ...


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as _Library
else:
    _Library = object  # _Prepared is mixed into a class that brings the rest


class _Prepared(_Library):
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

        self._fix_text = ftfy.fix_text
        split_words: Any = English().tokenizer
        self._split_words = split_words
        self._split_pairs = _pairs_of_one_word(
            [token[ORTH].lower() for token in tokens] for tokens in split_words.rules.values())
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


def _prepared(tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.PreTrainedTokenizerBase:
    """Another family's tokenizer made one of ours, in place."""
    family: Any = type(tokenizer)
    tokenizer.__class__ = type(family.__name__, (_OfOtherFamily, family), {
        # Another process could not import a class that was made here: it makes it again.
        "__reduce__": lambda self: (_prepared, (family.__new__(family),), self.__dict__)})
    return tokenizer


def get_tokenizer(model_checkpoint: str) -> Tokenizer:
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
    special = {token for token, added in tokenizer.added_tokens_decoder.items()
               if added.special and not BYTE.fullmatch(added.content)}
    tokenizer.control = frozenset({*tokenizer.all_special_ids, *special}) - {tokenizer.unk_token_id}
    return tokenizer


def _control_tokens_of_early_2019(checkpoint: str) -> list[str]:
    """The lines of ``special_tokens.txt``, which names control tokens in the order of their ids, behind the words'."""
    path = Path(checkpoint, "special_tokens.txt")
    return path.read_text("utf-8").split()[:1_000] if path.is_file() else []


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write a tokenizer's files into a folder. Raises ``OSError`` when it cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # what the tokenizers library raises, whatever happens
        raise disk_error(error, folder) from None


def fingerprint(tokenizer) -> str:
    """Changes whenever the tokenizer would give other ids."""
    parts = [type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str()]
    if isinstance(tokenizer, OpenAIGPTTokenizer):
        parts += [version("spacy"), version("ftfy")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
