"""What counts as a word, and when two texts say the same: the readings that distractors, splits and metrics share."""

import re
import string
import unicodedata
from functools import lru_cache

UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Chinese and Japanese letters, between whose words is no space


def words(text: str) -> list[str]:
    """Lower-case words; of Chinese and Japanese, letters."""
    return re.findall(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+", text.lower())


def letters_apart(text: str) -> str:
    """Chinese and Japanese letters as words of their own; other text, which has spaces, as it is."""
    return re.sub(rf"([{UNSPACED}])", r" \1 ", text)


def normalized(text: str) -> list[str]:
    """Words as ParlAI compares them: lower case, without punctuation and articles.

    ParlAI would take a Chinese or Japanese clause for one word; here its letters are compared, as is usual there.
    """
    text = re.sub(f"[{re.escape(string.punctuation)}\u3000-\u303f\uff00-\uff0f\uff1a-\uff20]", " ", text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", letters_apart(text)).split()


@lru_cache(1 << 16)
def bare(text: str) -> str:
    """The letters and digits of a text's `normalized` words, end to end, by which two texts are known to say the same.

    Texts that ParlAI's normalisation holds equal are equal here, and so are spellings that a tokenizer may make one of:
    of spaces, cases, quotation marks, full-width letters. Text without a letter stays as it is normalised.
    """
    words = " ".join(normalized(text))
    letters = unicodedata.normalize("NFKC", words).casefold()
    return "".join(filter(str.isalnum, letters)) or words
