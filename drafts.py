"""Guess the next tokens of a reply, so that one forward pass can compute several of them.

On its own, a token takes almost as long as four, because every pass reads all weights. So a pass over the last token
also computes a few guesses. If decoding then chooses a guessed token, its logits are there already; if not, they are
dropped (Leviathan et al. 2023, with guesses that are certain). In float32 the replies are the same as without guesses;
in half precision a pass over more tokens rounds differently, which can decide a near tie.

A guess is what followed the last tokens earlier: in other replies of the model, which `recipes/drafts.py` counts, or in
this conversation (Yang et al. 2023). This file knows token ids only.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cli import InputError
from files import write_tensors

FILE = "drafts.safetensors"  # in the folder of a model
ORDER = 3  # tokens that a guess looks at
GUESSES = 3  # per pass: more are seldom right, and more rows take longer
RECENT = 1024  # tokens of a conversation that are searched
LARGEST = 1 << 20  # n-grams in a file
NGrams = dict[tuple[int, ...], int]  # one to `ORDER` tokens → the token that follows


def count_ngrams(texts: Iterable[Sequence[int]]) -> NGrams:
    """Return, for every one to `ORDER` tokens in a row, the token that follows them most often in ``texts``."""
    counts: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for text in texts:
        for place in range(1, len(text)):
            for size in range(1, min(ORDER, place) + 1):
                counts[tuple(text[place - size:place])][text[place]] += 1
    return {before: found.most_common(1)[0][0] for before, found in counts.items()}


def write_drafts(ngrams: NGrams, folder: Path) -> Path:
    """Write n-grams into the folder of a model and return the file. Raises ``OSError`` when it cannot be written.

    Each row of the tensor "ngrams", (n-grams, `ORDER` + 1), ends with the token that follows; -1 fills short rows.
    """
    rows = [[-1] * (ORDER - len(before)) + [*before, after] for before, after in sorted(ngrams.items())]
    write_tensors({"ngrams": torch.tensor(rows, dtype=torch.int32).view(-1, ORDER + 1)}, folder / FILE, {})
    return folder / FILE


def read_drafts(folder: Path, vocabulary: int) -> NGrams:
    """Read the n-grams in the folder of a model with ``vocabulary`` tokens; return {} if it has none.

    Raises `InputError` for a file that is damaged or belongs to another vocabulary.
    """
    if not (path := folder / FILE).is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            shape = file.get_slice("ngrams").get_shape()
            if len(shape) != 2 or shape[1] != ORDER + 1 or shape[0] > LARGEST:
                raise ValueError(f"it has the shape {shape}")
            rows = file.get_tensor("ngrams")
        known = (rows >= -1) & (rows < vocabulary)
        if rows.dtype not in (torch.int32, torch.int64) or not known.all() or (rows[:, ORDER - 1:] < 0).any():
            raise ValueError("its tokens are not those of this model")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it, or make it again with recipes/drafts.py. "
                         "The model works without it, but slower") from None
    return {tuple(token for token in before if token >= 0): after for *before, after in rows.tolist()}


class Ahead:
    """One sequence, its guesses, and the logits computed ahead.

    ``ids``: the tokens so far, to which the owner appends; ``longest``: the number of tokens that they may become.
    """

    def __init__(self, ngrams: NGrams, ids: Sequence[int], longest: int):
        self.ngrams, self.ids, self.longest = ngrams, list(ids), longest
        self.own: NGrams = {}  # of this sequence
        self.searched = max(1, len(self.ids) - RECENT)  # tokens of which `own` knows
        self.computed: list[tuple[int, torch.Tensor]] = []  # guessed tokens, and the logits after each

    def step(self, compute: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
        """Return the logits after the last token, (1, vocabulary).

        ``compute`` takes the tokens that follow the computed ones and returns the logits after each, (tokens,
        vocabulary). It is called unless the last token was guessed.
        """
        last = self.ids[-1]
        if self.computed and self.computed[0][0] == last:
            return self.computed.pop(0)[1]
        guesses = self.guess(min(GUESSES, self.longest - len(self.ids) - 1))
        logits = compute([last, *guesses])
        if guesses and not logits[0].amax().isfinite():  # a guess that is not a number must not spoil the reply
            guesses, logits = [], compute([last])
        self.computed = [(guess, logits[place:place + 1]) for place, guess in enumerate(guesses, 1)]
        return logits[:1]

    def guess(self, most: int) -> list[int]:
        """Guess at most ``most`` tokens that follow `ids`."""
        for place in range(self.searched, len(self.ids)):
            for size in range(1, min(ORDER, place) + 1):
                self.own[tuple(self.ids[place - size:place])] = self.ids[place]
        self.searched = len(self.ids)
        text = self.ids[-ORDER:]
        for _ in range(most):
            befores = (tuple(text[-size:]) for size in range(min(ORDER, len(text)), 0, -1))
            after = next((known[before] for before in befores for known in (self.ngrams, self.own) if before in known),
                         None)
            if after is None:
                break
            text.append(after)
        return text[len(self.ids[-ORDER:]):]
