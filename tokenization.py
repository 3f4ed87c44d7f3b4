"""Convert text to token ids and back: the tokenizers of GPT-1, GPT-2 and other decoders, with five control tokens."""

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
from pretrained import is_checkpoint_file, loading_arguments, quiet_transformers, read_config, resolve_checkpoint

# The five control tokens, appended to a pretrained vocabulary in the order of ATTR_TO_SPECIAL_TOKEN.
SPECIAL_TOKENS = ["<bos>", "<eos>", "<speaker1>", "<speaker2>", "<pad>"]
ATTR_TO_SPECIAL_TOKEN = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "additional_special_tokens": ["<speaker1>", "<speaker2>"],
}


BYTE = re.compile("<0x[0-9A-F]{2}>")  # some tokenizers spell rare characters as such bytes


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that this project uses, and two methods of `_PreparedTokenizer`."""

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
    own_names: dict[str, Any]

    def __call__(self, text: str | list[str], **kwargs) -> Any: ...
    def __len__(self) -> int: ...
    def encode(self, text: str, **kwargs) -> list[int]: ...
    def decode(self, token_ids: int | Sequence[int], **kwargs) -> Any: ...
    def get_vocab(self) -> dict[str, int]: ...
    def convert_ids_to_tokens(self, ids: Any) -> Any: ...
    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any: ...
    def add_special_tokens(self, special_tokens_dict: dict) -> int: ...
    def save_pretrained(self, save_directory: Any) -> Any: ...
    def apply_chat_template(self, conversation: Any, **kwargs) -> Any: ...
    def encode_persona(self, sentences: Sequence[str]) -> list[list[int]]: ...
    def first_piece(self, word: str, after_space: bool) -> int | None: ...


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as _Library
else:
    _Library = object  # `_PreparedTokenizer` is mixed into a class of the library


class _PreparedTokenizer(_Library):
    """A mixin for tokenizers of transformers: it prepares each text, and no text becomes a control token."""

    control: frozenset[int] = frozenset()  # ids that no text may get
    own_names: dict[str, Any] = {}  # role → own control token, if there is a chat template but not our control tokens

    def prepare(self, text: str) -> str:
        """Change a text before it is tokenised; here only outer white space goes, as in 2019."""
        return text.strip()

    def first_piece(self, word: str, after_space: bool) -> int | None:
        """Return the id of a word's first token, at the beginning of a text or after a space; None if it is unknown."""
        before = self.backend_tokenizer.encode("a", add_special_tokens=False).ids if after_space else []
        ids = self.backend_tokenizer.encode("a " * after_space + word, add_special_tokens=False).ids[len(before):]
        return ids[0] if ids and ids[0] != self.unk_token_id else None

    def encode_persona(self, sentences: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each sentence of a persona; as in 2019, they are those of any other text."""
        return self(list(sentences))["input_ids"] if sentences else []

    def _clean(self, text: str) -> str:
        return self.prepare(text.encode("utf-8", "replace").decode())  # without lone surrogates, which JSON can spell

    def _encode_plus(self, text, *args, is_split_into_words=False, **kwargs):
        if not is_split_into_words:
            text = self._clean(text) if isinstance(text, str) else [self._clean(one) for one in text]
        kwargs["add_special_tokens"] = False  # inputs.py adds all control tokens
        encoding = super()._encode_plus(text, *args, is_split_into_words=is_split_into_words, **kwargs)
        # The files of a hostile tokenizer can give a word the id of a control token.
        for ids in [encoding["input_ids"]] if isinstance(text, str) else encoding["input_ids"]:
            if not self.control.isdisjoint(ids):
                raise InputError(f"{self.name_or_path}: its tokenizer turns plain text into control tokens; "
                                 "put the tokenizer's original files into the folder")
        return encoding


# Both classes keep the name of the class that they extend: run folders record it, and plain transformers looks it up.
class GPT2Tokenizer(_PreparedTokenizer, transformers.GPT2Tokenizer):
    """GPT-2's byte-level BPE."""


class OpenAIGPTTokenizer(_PreparedTokenizer, transformers.OpenAIGPTTokenizer):
    """GPT-1's BPE, applied to words that are split as in GPT-1's training text.

    Radford et al. (2018) cleaned their text with ftfy, put spaces around some punctuation and split it with spaCy's
    English tokenizer, so that "don't" became "do n't". The class of transformers splits at punctuation instead, which
    gives other ids for every contraction.
    """

    _PLAIN = str.maketrans({"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"})
    _SET_APART = re.compile(r'(-+|~+|!+|"+|;+|\?+|\++|,+|\)+|\(+|\\+|/+|\*+|\[+|\]+|}+|{+|\|+|_+)')
    _ENDINGS = frozenset(["n't", "'m", "'s", "'d", "'ll", "'re", "'ve"])
    _PUNCTUATION = re.compile(r"[.,?!]+")
    _ENDLESS_WORD = re.compile(r"(\S{200})(?=\S)")  # spaCy takes minutes over twenty thousand exclamation marks

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        import ftfy  # ftfy and spaCy take a second to import, and only this family needs them
        from spacy.lang.en import English
        from spacy.symbols import ORTH

        self._fix_text = ftfy.fix_text
        split_words: Any = English().tokenizer
        self._split_words = split_words
        self._split_pairs = _joined_pairs(
            [token[ORTH].lower() for token in tokens] for tokens in split_words.rules.values())
        # `prepare` separates all words by one space; a line break is a word of its own.
        self._tokenizer.normalizer = None
        self._tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
        # This lets decode(clean_up_tokenization_spaces=True) join "do n't" again. For other BPEs it would be harmful,
        # as the name says; here it undoes what `prepare` did.
        self.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True

    def prepare(self, text: str) -> str:
        text = self._fix_text(text).translate(self._PLAIN)
        text = self._SET_APART.sub(r" \1 ", text)
        text = re.sub(r"[^\S\n]+", " ", text)
        text = re.sub(r" ?\n\s*", " \n ", text).strip()
        text = self._ENDLESS_WORD.sub(r"\1 ", text)
        return " ".join(word.text.strip(" ").lower() for word in self._split_words(text))

    def clean_up_tokenization(self, text: str) -> str:
        """Join the words that `prepare` has split: "i 'd" → "i'd", "gon na" → "gonna".

        Where `prepare` gives two spellings the same words, the result is the more frequent one in PERSONA-CHAT, such as
        "cannot" rather than "can not". When the text continues, only its last word can still change, so that a reply
        can be printed word by word.
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
        # As in the ConvAI2 code of 2019, the word is not split as `prepare` would split "i'm" into "i" and "'m".
        pieces = self._tokenizer.model.tokenize(word.lower())
        return pieces[0].id if pieces and pieces[0].id != self.unk_token_id else None


PRONOUNS = frozenset("i you he she it we they that there".split())


def _joined_pairs(splits: Iterable[list[str]]) -> frozenset[tuple[str, str]]:
    """Return the pairs of neighbours that are written as one word, such as ("gon", "na").

    ``splits``: the exceptions of spaCy's tokenizer, each a list of pieces. Without an apostrophe, a pair can come from
    one word or from two: "im" and "i m" have the same pieces. PERSONA-CHAT mostly separates a pronoun ("i m"), except
    before "re", and joins all other pairs ("whats", "dont").
    """
    return frozenset(pair for pieces in splits if "".join(pieces).replace("'", "").isalnum()
                     for pair in pairwise(pieces) if pieces[0] not in PRONOUNS or pair[1] == "re")


TOKENIZERS = {"openai-gpt": OpenAIGPTTokenizer, "gpt2": GPT2Tokenizer}


class _AnyFamilyTokenizer(_PreparedTokenizer):
    """A mixin for the tokenizers of other families than GPT-1 and GPT-2."""

    def encode_persona(self, sentences: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each sentence of a persona as they are after a space.

        No control token separates the sentences, and these models were pretrained on text with a space between two
        sentences: "I live in Norway. I have a dog."
        """
        before = self("a")["input_ids"]
        after_space = self(["a " + sentence.strip() for sentence in sentences])["input_ids"] if sentences else []
        return [ids[len(before):] for ids in after_space]


def _prepare_tokenizer(tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.PreTrainedTokenizerBase:
    """Add the mixin to the tokenizer of another family, in place."""
    family: Any = type(tokenizer)
    tokenizer.__class__ = type(family.__name__, (_AnyFamilyTokenizer, family), {
        # Another process cannot import a class that is made here; it makes the class again.
        "__reduce__": lambda self: (_prepare_tokenizer, (family.__new__(family),), self.__dict__)})
    return tokenizer


def get_tokenizer(model_checkpoint: str) -> Tokenizer:
    """Load the tokenizer of a checkpoint and add the five control tokens to its vocabulary.

    ``model_checkpoint``: see `resolve_checkpoint`. The model's family (``model_type`` in ``config.json``) decides the
    class. Raises `InputError` when there is no usable configuration or tokenizer.
    """
    checkpoint = resolve_checkpoint(model_checkpoint)
    family = read_config(checkpoint).model_type
    if is_checkpoint_file(checkpoint):
        checkpoint = str(Path(checkpoint).absolute().parents[1])  # the run folder has the tokenizer
    try:
        if family in TOKENIZERS:
            tokenizer = TOKENIZERS[family].from_pretrained(checkpoint, split_special_tokens=True)
        else:
            with quiet_transformers():
                tokenizer = _prepare_tokenizer(transformers.AutoTokenizer.from_pretrained(
                    **loading_arguments(checkpoint), split_special_tokens=True, trust_remote_code=False))
            if tokenizer.chat_template and not set(SPECIAL_TOKENS) <= tokenizer.get_vocab().keys():
                tokenizer.own_names = dict(tokenizer.special_tokens_map)
        tokenizer.add_tokens(_control_tokens_of_early_2019(checkpoint), special_tokens=True)
        tokenizer.encode("hello")
    except Exception as error:  # tokenizers raises bare Exceptions for damaged files
        raise InputError(f"{checkpoint}: its tokenizer cannot be read ({short(str(error))}); the folder needs "
                         "vocab.json and merges.txt, or tokenizer.json") from None
    if not tokenizer.is_fast:
        raise InputError(f"{checkpoint}: its tokenizer has no tokenizer.json; convert its files to one")
    if len(tokenizer) < 50:  # for a folder without files transformers makes an empty tokenizer
        raise InputError(f"{checkpoint}: has no tokenizer files; add vocab.json and merges.txt, or tokenizer.json")
    tokenizer.add_special_tokens(ATTR_TO_SPECIAL_TOKEN)
    special = {token for token, added in tokenizer.added_tokens_decoder.items()
               if added.special and not BYTE.fullmatch(added.content)}
    tokenizer.control = frozenset({*tokenizer.all_special_ids, *special}) - {tokenizer.unk_token_id}
    return tokenizer


def _control_tokens_of_early_2019(checkpoint: str) -> list[str]:
    """Return the lines of ``special_tokens.txt``, control tokens in the order of their ids after those of the words."""
    path = Path(checkpoint, "special_tokens.txt")
    return path.read_text("utf-8").split()[:1_000] if path.is_file() else []


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write a tokenizer's files into a folder. Raises ``OSError`` when they cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise disk_error(error, folder) from None


def fingerprint(tokenizer) -> str:
    """Return a hash of everything on which a tokenizer's ids depend."""
    parts = [type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str()]
    if isinstance(tokenizer, OpenAIGPTTokenizer):
        parts += [version("spacy"), version("ftfy")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
