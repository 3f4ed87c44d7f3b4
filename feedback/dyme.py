"""Predict which metrics the next utterance of a dialog usually has, and reward utterances near the prediction.

This is DYME ("A dynamic metric for dialog modeling learned from human conversations", von Unold et al. 2021).
"""

import copy
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from embeddings import embed
from feedback.utterance_metrics import METRICS, lowercase_words, measure

WINDOW = 3  # utterances before the predicted one that the network reads
SIZE = 384  # numbers in a sentence embedding
HIDDEN = 64
BATCH, EPOCHS = 64, 20
RESERVED = 10  # each tenth dialog is reserved


class Network(nn.Module):
    """Predicts metrics, (utterances, 5), as a linear function of earlier metrics plus a hidden layer over all inputs.

    The inputs are ``metrics`` (utterances, features) and ``vectors`` (utterances, WINDOW · SIZE), sentence embeddings.
    The network begins as the linear regression of ``wanted`` (utterances, 5) on ``metrics``.
    """

    def __init__(self, metrics: torch.Tensor, wanted: torch.Tensor):
        super().__init__()
        features = metrics.shape[1]
        self.linear, self.last = nn.Linear(features, len(METRICS)), nn.Linear(HIDDEN, len(METRICS))
        self.hidden = nn.Linear(features + WINDOW * SIZE, HIDDEN)
        ones = torch.ones(len(metrics), 1)
        found = torch.linalg.lstsq(torch.cat([metrics, ones], 1), wanted, driver="gelsd").solution
        with torch.no_grad():
            self.linear.weight.copy_(found[:-1].T)
            self.linear.bias.copy_(found[-1])
            for parameter in self.last.parameters():
                parameter.zero_()

    def forward(self, metrics: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        mixed = torch.cat([metrics, F.dropout(vectors, 0.5, self.training)], -1)
        hidden = F.dropout(F.gelu(self.hidden(mixed)), 0.2, self.training)
        return self.linear(metrics) + self.last(hidden)


def inputs_of(history: Sequence[str], measured: Sequence[np.ndarray],
              known: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return what the network reads of a history: (features,) and (WINDOW · SIZE,).

    ``measured``: the metrics of its last utterances; ``known``: the embeddings of these, by text.
    """
    window, vectors = np.zeros((WINDOW, len(METRICS))), np.zeros((WINDOW, SIZE))
    for back, (text, values) in enumerate(zip(reversed(history[-WINDOW:]), reversed(measured[-WINDOW:]),
                                              strict=True)):
        window[back], vectors[back] = values, known[text]
    lengths = [len(lowercase_words(text)) / 10 for text in history[-2:]]
    lengths += [0.0] * (2 - len(lengths))
    return np.array([*window.ravel(), min(len(history), 10) / 10, *lengths]), vectors.ravel()


class Examples(NamedTuple):
    """What the network reads and should predict, for each utterance but the first of each dialog."""

    metrics: np.ndarray  # (utterances, features), as `inputs_of` returns them for the history
    vectors: np.ndarray  # (utterances, WINDOW · SIZE)
    following: np.ndarray  # the utterance's own metrics, (utterances, 5)
    dialog: np.ndarray  # its dialog's number, (utterances,)


def examples(dialogs: Sequence[Sequence[str]]) -> Examples:
    """Measure and embed whole dialogs, each a list of utterances."""
    known, seen, following, numbers = embed([text for dialog in dialogs for text in dialog]), [], [], []
    of_all = iter(measure([(text, dialog[:place]) for dialog in dialogs for place, text in enumerate(dialog)]))
    for number, dialog in enumerate(dialogs):
        measured = list(islice(of_all, len(dialog)))
        for place in range(1, len(dialog)):
            seen.append(inputs_of(dialog[:place], measured[:place], known))
            following.append(measured[place])
            numbers.append(number)
    metrics, vectors = (np.stack(part) for part in zip(*seen, strict=True))
    return Examples(metrics, vectors, np.array(following), np.array(numbers))


class Dyme:
    """A predictor of the metrics of a dialog's next utterance, which rewards utterances near the prediction.

    An utterance is good if its metrics are like those of people at the same place. The network reads the sentence
    embeddings and metrics of the last ``WINDOW`` utterances (0 if there are fewer), the number of utterances, and the
    lengths of the last two. Histories must begin with the dialog's first utterance.
    """

    def __init__(self, learnt: Examples, seed: int = 0):
        """Learn from the `examples` of some dialogs; the same dialogs and seed always give the same network.

        Each tenth dialog is reserved: it says when to stop training, and how much people deviate from the prediction.
        """
        metrics, vectors, following, dialog = learnt
        self.center, self.width = metrics.mean(0), metrics.std(0) + 1e-6
        self.spread = following.std(0).clip(min=1e-6)  # the unit of each metric
        wanted, fresh = following / self.spread, dialog % RESERVED == RESERVED - 1
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.network = self._trained(self._tensors(metrics, vectors), torch.tensor(wanted).float(),
                                         torch.tensor(fresh))
        usual = np.abs(wanted - self.predict(metrics, vectors)).mean(1)[fresh if fresh.any() else ~fresh]
        self.mean, self.scale = float(usual.mean()), float(usual.std()) or 1.0  # mean and spread of people's deviations
        self._remembered = lru_cache(1000)(self._expected)  # several replies to a context follow each other

    def _tensors(self, metrics: np.ndarray, vectors: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale both inputs so that each number has a standard deviation near 1."""
        return (torch.tensor((metrics - self.center) / self.width).float(),
                torch.tensor(vectors * SIZE ** 0.5).float())

    @staticmethod
    def _trained(inputs: tuple[torch.Tensor, torch.Tensor], wanted: torch.Tensor, reserved: torch.Tensor) -> Network:
        """Minimise the squared error, and return the network of the epoch with the least error on ``reserved`` rows."""
        learnt = torch.nonzero(~reserved)[:, 0]
        network = Network(inputs[0][learnt], wanted[learnt]).eval()

        def error() -> float:
            with torch.no_grad():
                return F.mse_loss(network(*(part[reserved] for part in inputs)), wanted[reserved]).item()

        least, best = error(), copy.deepcopy(network)  # NaN, which nothing is less than, without reserved rows
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, weight_decay=0.1)
        for _ in range(EPOCHS):
            network.train()
            for batch in learnt[torch.randperm(len(learnt))].split(BATCH):
                optimizer.zero_grad()
                F.mse_loss(network(*(part[batch] for part in inputs)), wanted[batch]).backward()
                optimizer.step()
            network.eval()
            if error() < least:
                least, best = error(), copy.deepcopy(network)
        return best

    @torch.no_grad()
    def predict(self, metrics: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Predict the metrics, (utterances, 5), in units of their standard deviation, from what `examples` returns."""
        return self.network(*self._tensors(metrics, vectors)).numpy()

    def _expected(self, history: tuple[str, ...]) -> np.ndarray:
        first = max(0, len(history) - WINDOW)  # earlier utterances are not used
        measured = measure([(text, history[:place]) for place, text in enumerate(history[first:], first)])
        metrics, vectors = inputs_of(history, list(measured), embed(history[first:]))
        return self.predict(metrics[None], vectors[None])[0]

    def expected(self, history: Sequence[str]) -> np.ndarray:
        """Predict the metrics of the next utterance, (5,), in units of their standard deviation among people."""
        return self._remembered(tuple(history))

    def deviation(self, utterance: str, history: Sequence[str]) -> float:
        """Return the mean absolute difference of an utterance's metrics from the `expected` ones, in their units."""
        return float(np.abs(measure([(utterance, history)])[0] / self.spread - self.expected(history)).mean())

    def reward(self, utterance: str, history: Sequence[str]) -> float:
        """Return minus the `deviation`, scaled to mean 0 and standard deviation 1 over people's utterances."""
        return (self.mean - self.deviation(utterance, history)) / self.scale
