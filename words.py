"""Split text into words, and decide when two texts say the same: shared by distractors, splits and metrics."""

import re
import string
import unicodedata
from functools import lru_cache

UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Chinese and Japanese characters: no spaces between their words


def words(text: str) -> list[str]:
    """Return the words in lower case; each Chinese or Japanese character counts as a word."""
    return re.findall(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+", text.lower())


def separate_letters(text: str) -> str:
    """Put spaces around Chinese and Japanese characters, so that each becomes a word; other text stays as it is."""
    return re.sub(rf"([{UNSPACED}])", r" \1 ", text)


def normalized(text: str) -> list[str]:
    """Return the words as ParlAI compares them: in lower case, without punctuation and articles.

    ParlAI would take a whole Chinese or Japanese clause for one word. Here each character of such a clause is a word,
    as is usual for these languages.
    """
    text = re.sub(f"[{re.escape(string.punctuation)}\u3000-\u303f\uff00-\uff0f\uff1a-\uff20]", " ", text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", separate_letters(text)).split()


@lru_cache(1 << 16)
def text_key(text: str) -> str:
    """Return a key that is equal for two texts if they say the same.

    The key is the letters and digits of the `normalized` words, joined. So texts that ParlAI considers equal have one
    key, and so have spellings that a tokenizer may not distinguish: they differ in spaces, case, quotation marks or
    full-width characters. A text without letters and digits has its normalized words as the key.
    """
    words = " ".join(normalized(text))
    letters = unicodedata.normalize("NFKC", words).casefold()
    return "".join(filter(str.isalnum, letters)) or words
