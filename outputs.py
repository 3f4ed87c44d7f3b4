"""Run a model over turns or questions, and record what it makes of each: scores, likelihoods, replies.

`metrics.py` computes the figures of an evaluation from these records.
"""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from consistency import Question
from decoding import Decoding, Memory, fitted_context, generate_replies, readable
from inputs import IGNORED, LengthBatches, Row, TurnDataset, collate, get_loader, max_reply
from metrics import split_words
from model import DoubleHeadsModel, autocast
from tables import tokenize
from templates import tokens_for_chat
from tokenization import Tokenizer
from words import UNSPACED

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------- hits@k


@torch.inference_mode()
def choice_scores(model: DoubleHeadsModel, dataset: TurnDataset, batch_size: int = 16,
                  fp16: str = "") -> Iterator[tuple[int, dict]]:
    """Yield each turn's number, and its ``scores``, one per candidate, with the best candidate as the ``reply``."""
    loader, device = get_loader(dataset, dataset.lengths()[0], batch_size), str(model.device)
    for turns, batch in zip(loader.batch_sampler, loader, strict=True):
        with autocast(device, fp16):
            out = model(**{name: tensor.to(device) for name, tensor in batch.items()})
        for turn, logits in zip(turns.tolist(), out.mc_logits.tolist(), strict=True):
            scores = [score for score in logits if score > -math.inf]
            yield turn, {"scores": scores, "reply": dataset.split.texts("candidates", turn)[scores.index(max(scores))]}


# --------------------------------------------------------------------------------------------------- perplexity


SMOOTHING = 5  # added to each word's count, as in 2019


class WordShares:
    """Word probabilities by ConvAI2's protocol, for a model that predicts pieces of words.

    The probability of a piece is divided among all dictionary words that begin with it, in proportion to their counts
    + 5. So the later pieces of a word are not needed.
    """

    def __init__(self, counts: Mapping[str, int], tokenizer: Tokenizer, after_space: bool):
        """Divide the dictionary's words by first piece. ``after_space``: their pieces within a reply, not at its start.

        GPT-2 spells the first word of a reply in other pieces.
        """
        pieces, shares = {}, defaultdict(int)
        for word in counts:
            pieces[word] = tokenizer.first_piece(word, after_space)
            shares[pieces[word]] += counts[word] + SMOOTHING
        self.unspellable = [word for word, piece in pieces.items() if piece is None]
        self.share = {word: (piece, (counts[word] + SMOOTHING) / shares[piece])
                      for word, piece in pieces.items() if piece is not None}
        self.pieces = torch.tensor(sorted({piece for piece, _ in self.share.values()}), dtype=torch.long)

    def probabilities(self, logits: torch.Tensor) -> dict[str, float]:
        """Return the probability of each word, given next-token logits (vocabulary,). The sum may be less than 1."""
        piece_probabilities = logits.float().softmax(-1).tolist()
        return {word: piece_probabilities[piece] * share for word, (piece, share) in self.share.items()}


class WordRow:
    """A turn packed so that one pass predicts every token and every whole word of the gold reply.

    For each word, the protocol tokenises the words before it anew. Mostly this gives a beginning of the tokenised
    reply, and the word is predicted there. Otherwise these tokens get a segment of their own in the row.
    """

    def __init__(self, dataset: TurnDataset, turn: int, words: list[str], beginnings: list[list[int]]):
        """Pack a turn. ``beginnings``: the token ids of the first 0, 1, … words of the reply's ``words``."""
        gold = dataset.split.token_ids("candidates", turn)[-1]
        segments = [gold]
        place = []  # for each word: the segment, and the number of its tokens before the word
        for beginning in reversed(beginnings):
            host = next((n for n, ids in enumerate(segments) if ids[:len(beginning)] == beginning), None)
            if host is None:
                host = len(segments)
                segments.append(beginning)
            place.append((host, len(beginning)))
        self.row: Row = dataset.pack(turn, segments[::-1])
        ends, longest = self.row.mc_token_ids[0][::-1], max_reply(dataset.max_positions, dataset.history_start)
        self.words = []  # (word, index in the row of the token that predicts it)
        for word, (host, length) in zip(words, reversed(place), strict=True):
            start = ends[host] - 1 - min(len(segments[host]), longest)
            if start + length < ends[host]:  # otherwise cut off, because the reply is too long for the model
                self.words.append((word, start + length))
                self.row.labels[start + length + 1] = max(self.row.labels[start + length + 1], 0)  # requests logits
        self.tokens = range(ends[0] - min(len(gold), longest), ends[0] + 1)
        self.cut = len(words) - len(self.words)


def word_shares(counts: Mapping[str, int], tokenizer: Tokenizer,
                legacy_gpt2_words: bool) -> tuple[WordShares, WordShares]:
    """Return the `WordShares` of a reply's first word and of all others; ``legacy_gpt2_words`` makes both the same."""
    if any(re.search(f"[{UNSPACED}]", word) for word in counts):
        logger.warning("Word PPL splits words at spaces, so Chinese and Japanese clauses count as single words; "
                       "compare models by Token PPL")
    first, later = (WordShares(counts, tokenizer, after_space) for after_space in (False, not legacy_gpt2_words))
    if later.unspellable:
        logger.warning("%s of the dictionary's %s words count as unknown, because the tokenizer cannot spell how they "
                       "begin, for example %s", f"{len(later.unspellable):,}", f"{len(counts):,}",
                       ", ".join(map(repr, later.unspellable[:3])))
    return first, later


def gold_likelihoods(model: DoubleHeadsModel, dataset: TurnDataset, tokenizer: Tokenizer, counts: Mapping[str, int],
                     batch_size: int = 16, fp16: str = "", legacy_gpt2_words: bool = False,
                     ) -> Iterator[tuple[int, dict]]:
    """Yield each turn's number and `likelihoods`. ``counts``: the dictionary's words with their counts."""
    shares = word_shares(counts, tokenizer, legacy_gpt2_words)
    for turns in map(np.ndarray.tolist, LengthBatches(dataset.lengths()[0], batch_size)):
        yield from zip(turns, likelihoods(model, dataset, turns, tokenizer, shares, fp16), strict=True)


@torch.inference_mode()
def likelihoods(model: DoubleHeadsModel, dataset: TurnDataset, turns: list[int], tokenizer: Tokenizer,
                shares: tuple[WordShares, WordShares], fp16: str = "") -> list[dict]:
    """Measure the negative log-likelihoods of the gold replies of a batch of turns, in nats.

    Return for each turn: ``nll``, summed over the number ``tokens`` of tokens including ``<eos>``; ``word_nll``, summed
    over the number ``words`` of words in the dictionary; and the number of ``unknown_words``, which the protocol skips.
    """
    replies = [split_words(dataset.split.texts("candidates", turn)[-1]) for turn in turns]
    beginnings = iter(tokenize(tokenizer, [" ".join(words[:n]) for words in replies for n in range(len(words))]))
    rows = [WordRow(dataset, turn, words, [next(beginnings) for _ in words])
            for turn, words in zip(turns, replies, strict=True)]
    batch = collate([row.row for row in rows], dataset.special.pad)
    device = str(model.device)
    with autocast(device, fp16):
        out = model(**{name: tensor.to(device) for name, tensor in batch.items()})
    at = {place: n for n, place in enumerate(map(tuple, (batch["labels"][:, 1:] != IGNORED).nonzero().tolist()))}
    # Each place needs only three numbers; they are gathered on the device and copied in one transfer.
    logits, records = out.logits, []
    masses = [logits[:, one.pieces.to(logits.device)].logsumexp(-1).tolist() for one in shares]
    gold = [[(at[n, place - 1], row.row.input_ids[place]) for place in row.tokens] for n, row in enumerate(rows)]
    words = [[(at[n, place], word, number > 0) for number, (word, place) in enumerate(row.words)
              if word in shares[number > 0].share] for n, row in enumerate(rows)]
    token_nll = iter(_negative_log_softmax(logits, [pair for row in gold for pair in row]))
    piece_logits = iter(_gather(logits, [(line, shares[later].share[word][0]) for row in words
                                         for line, word, later in row]))
    for row, tokens, known in zip(rows, gold, words, strict=True):
        records.append({
            "nll": math.fsum(next(token_nll) for _ in tokens), "tokens": len(tokens),
            "word_nll": math.fsum(masses[later][line] - next(piece_logits) - math.log(shares[later].share[word][1])
                                  for line, word, later in known),
            "words": len(known), "unknown_words": len(row.words) + row.cut - len(known),
        })
    return records


def _gather(logits: torch.Tensor, places: list[tuple[int, int]]) -> list[float]:
    """Return ``logits[line, column]`` for each place."""
    lines, columns = torch.tensor(places, dtype=torch.long, device=logits.device).reshape(-1, 2).T
    return logits[lines, columns].tolist()


def _negative_log_softmax(logits: torch.Tensor, places: list[tuple[int, int]]) -> list[float]:
    everything = logits.logsumexp(-1).tolist()
    return [everything[line] - value for (line, _), value in zip(places, _gather(logits, places), strict=True)]


# ------------------------------------------------------------------------------------------------------ replies


def replies(model: DoubleHeadsModel, dataset: TurnDataset, tokenizer: Tokenizer, decoding: Decoding,
            batch_size: int) -> Iterator[tuple[int, dict]]:
    """Yield each turn's number and the generated ``reply``. A ``decoding.seed`` of 0 is a seed like any other here."""
    torch.manual_seed(decoding.seed)
    special, memory = tokens_for_chat(tokenizer), Memory()
    for start in range(0, len(dataset), batch_size):  # neighbours are turns of one dialog and share their beginning
        turns = range(start, min(start + batch_size, len(dataset)))
        contexts = [fitted_context(model, *dataset.context(turn), special, decoding.max_length)
                    for turn in turns]
        batch = generate_replies(model, contexts, special, decoding, memory=memory)
        for turn, reply in zip(turns, batch, strict=True):
            yield turn, {"reply": readable(tokenizer, reply)}


def reply_to(model: DoubleHeadsModel, tokenizer: Tokenizer, situations: Sequence[tuple[list[str], list[str]]],
             decoding: Decoding) -> list[str]:
    """Reply in each situation: a persona and the utterances so far, of which the model sees the last ones."""
    contexts, special = [], tokens_for_chat(tokenizer)
    for persona, said in situations:
        sentences = tokenizer.encode_persona([] if model.no_persona else persona)
        history = tokenize(tokenizer, said[-(2 * model.max_history + 1):])
        contexts.append(fitted_context(model, sentences, history, special, decoding.max_length))
    return [readable(tokenizer, reply) for reply in generate_replies(model, contexts, special, decoding)]


def answers(model: DoubleHeadsModel, tokenizer: Tokenizer, questions: Sequence[Question], decoding: Decoding,
            batch_size: int) -> Iterator[tuple[int, str]]:
    """Yield each question's number and the model's reply to it; questions of similar length share a batch."""
    torch.manual_seed(decoding.seed)
    asked = [(one.persona, [*one.history, one.question]) for one in questions]
    order = sorted(range(len(asked)), key=lambda number: sum(map(len, sum(asked[number], []))))
    for start in range(0, len(order), batch_size):
        numbers = order[start:start + batch_size]
        yield from zip(numbers, reply_to(model, tokenizer, [asked[number] for number in numbers], decoding),
                       strict=True)
