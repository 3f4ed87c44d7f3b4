"""The ConvAI2 metrics over the validation split: hits@1, perplexity, F1.

    python convai_evaluation.py --eval_type hits@1 --model_checkpoint RUN
"""

import json
import logging
import math
import re
import string
from argparse import ArgumentParser, Namespace
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from statistics import fmean, stdev

import numpy as np
import torch
from tqdm import tqdm

from corpora import InputError, command, require_split
from inputs import IGNORED, LengthBatches, Row, TurnDataset, collate, get_loader, pack_turn
from interact import add_decoding_flags, fitted_context, generate_replies, load_checkpoint
from model import DoubleHeadsModel, autocast, half_dtype
from utils import Split, TokenTable, add_common_flags, get_dataset, positive_number, tokenize

logger = logging.getLogger("convai_evaluation")


# ------------------------------------------------------------------------------------------------------- hits@k


@torch.inference_mode()
def choice_scores(model: DoubleHeadsModel, dataset: TurnDataset, args: Namespace) -> Iterator[tuple[int, dict]]:
    """For each turn its number and ``scores``, one a candidate in the data's order (gold last)."""
    loader = get_loader(dataset, dataset.lengths()[0], args.batch_size)
    for turns, batch in zip(loader.batch_sampler, loader, strict=True):
        with autocast(args.device, args.fp16):
            out = model(**{name: tensor.to(args.device) for name, tensor in batch.items()})
        for turn, scores in zip(turns.tolist(), out.mc_logits.tolist(), strict=True):
            yield turn, {"scores": [score for score in scores if score > -math.inf]}


def choice_metrics(records: list[dict]) -> dict[str, float]:
    """Hits@k: the share of turns whose gold candidate is among the k best; MRR: the mean of 1 / its rank.

    A candidate that scores as high as the gold one counts as better: a tie is no hit.
    """
    ranks = [1 + sum(score >= record["scores"][-1] for score in record["scores"][:-1]) for record in records]
    hits = {f"Hits@{k}": fmean(rank <= k for rank in ranks) for k in (1, 5, 10)}
    return hits | {"MRR": fmean(1 / rank for rank in ranks)}


# --------------------------------------------------------------------------------------------------- perplexity


SMOOTHING = 5  # added to each word's count, as in 2019


def split_words(text: str) -> list[str]:
    """Words of the ConvAI2 dictionary: what stands between spaces, with . , ; : ! ? set apart."""
    return re.sub(r"([.,;:!?])", r" \1 ", text).split()


def count_words(table: TokenTable) -> Counter:
    """How often each word stands in the data: every persona sentence and every utterance of a dialog, once."""
    counts = Counter()
    for split in table.values():
        last_turns = dict(zip(split.turn_dialog.tolist(), range(split.num_turns), strict=True))
        for dialog in range(len(split)):
            counts.update(word for text in split.texts("persona", dialog) for word in split_words(text))
        for turn in last_turns.values():  # whose history is all that was said before
            said = [*split.texts("history", turn), *split.texts("candidates", turn)[-1:]]
            counts.update(word for text in said for word in split_words(text))
    return counts


class WordShares:
    """Word probabilities by ConvAI2's protocol, from a model that predicts pieces of words.

    The probability of a word is that of its first piece, shared out among all dictionary words with this first piece
    in proportion to their counts + 5. So the model need not look into the rest of the word.
    """

    def __init__(self, counts: Mapping[str, int], tokenizer, after_space: bool):
        """``after_space``: for words within a reply; else for its first word, which GPT-2 spells in other pieces."""
        pieces, shares = {}, defaultdict(int)
        for word in counts:
            pieces[word] = tokenizer.first_piece(word, after_space)
            shares[pieces[word]] += counts[word] + SMOOTHING
        self.unspellable = [word for word, piece in pieces.items() if piece is None]
        self.share = {word: (piece, (counts[word] + SMOOTHING) / shares[piece])
                      for word, piece in pieces.items() if piece is not None}
        self.pieces = torch.tensor(sorted({piece for piece, _ in self.share.values()}))

    def probabilities(self, logits: torch.Tensor) -> dict[str, float]:
        """All words' probabilities from next-token logits (vocabulary,); their sum is the dictionary's total mass."""
        piece_probabilities = logits.float().softmax(-1).tolist()
        return {word: piece_probabilities[piece] * share for word, (piece, share) in self.share.items()}


class WordRow:
    """A turn packed so that one pass predicts every token and every whole word of its gold reply.

    The protocol tokenises the words before each word anew. Mostly that is a beginning of the tokenised reply, and the
    word is predicted there; where it is not, those tokens get a segment of their own in the row.
    """

    def __init__(self, dataset: TurnDataset, turn: int, words: list[str], beginnings: list[list[int]]):
        """``beginnings``: token ids of the first 0, 1, … words of ``words``."""
        gold = dataset.split.token_ids("candidates", turn)[-1]
        segments = [gold]
        place = []  # of each word: the segment, and how many of its tokens stand before the word
        for beginning in reversed(beginnings):
            host = next((n for n, ids in enumerate(segments) if ids[:len(beginning)] == beginning), None)
            if host is None:
                host = len(segments)
                segments.append(beginning)
            place.append((host, len(beginning)))
        context = dataset.context(turn)
        self.row: Row = pack_turn(*context, segments[::-1], dataset.special, dataset.max_positions)
        ends = self.row.mc_token_ids[::-1]
        self.words = []  # (word, index in the row of the token that predicts it)
        for word, (host, length) in zip(words, reversed(place), strict=True):
            start = ends[host] - 1 - min(len(segments[host]), dataset.max_positions - 4)
            if start + length < ends[host]:  # else cut off, in a reply longer than the model
                self.words.append((word, start + length))
                self.row.labels[start + length + 1] = max(self.row.labels[start + length + 1], 0)  # asks for logits
        self.tokens = range(ends[0] - min(len(gold), dataset.max_positions - 4), ends[0] + 1)
        self.cut = len(words) - len(self.words)


def word_shares(counts: Mapping[str, int], tokenizer, legacy_gpt2_words: bool) -> tuple[WordShares, WordShares]:
    """For the first word of a reply, and for all others; with ``legacy_gpt2_words`` the same, as in 2019."""
    first, later = (WordShares(counts, tokenizer, after_space) for after_space in (False, not legacy_gpt2_words))
    if later.unspellable:
        logger.warning("%s of the dictionary's %s words begin with what the tokenizer cannot spell, such as %s: they "
                       "count as unknown", f"{len(later.unspellable):,}", f"{len(counts):,}",
                       ", ".join(map(repr, later.unspellable[:3])))
    return first, later


def gold_likelihoods(model: DoubleHeadsModel, dataset: TurnDataset, tokenizer, counts: Mapping[str, int],
                     args: Namespace) -> Iterator[tuple[int, dict]]:
    """For each turn its number and `likelihoods`, under the dictionary of ``counts``."""
    shares = word_shares(counts, tokenizer, args.legacy_gpt2_words)
    for turns in map(np.ndarray.tolist, LengthBatches(dataset.lengths()[0], args.batch_size)):
        yield from zip(turns, likelihoods(model, dataset, turns, tokenizer, shares, args), strict=True)


@torch.inference_mode()
def likelihoods(model: DoubleHeadsModel, dataset: TurnDataset, turns: list[int], tokenizer,
                shares: tuple[WordShares, WordShares], args: Namespace) -> list[dict]:
    """How likely the gold replies of a batch of turns are, in nats.

    Of each: ``nll`` over ``tokens``, ``<eos>`` included; ``word_nll`` over ``words``, those that the dictionary has;
    ``unknown_words``: how many it has not, which are left out, as the protocol does.
    """
    replies = [split_words(dataset.split.texts("candidates", turn)[-1]) for turn in turns]
    beginnings = iter(tokenize(tokenizer, [" ".join(words[:n]) for words in replies for n in range(len(words))]))
    rows = [WordRow(dataset, turn, words, [next(beginnings) for _ in words])
            for turn, words in zip(turns, replies, strict=True)]
    batch = collate([row.row for row in rows], dataset.special.pad)
    with autocast(args.device, args.fp16):
        out = model(**{name: tensor.to(args.device) for name, tensor in batch.items()})
    at = {place: n for n, place in enumerate(map(tuple, (batch["labels"][:, 1:] != IGNORED).nonzero().tolist()))}
    # Only three numbers are wanted a place; they are gathered on the device and fetched at once.
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
    """``logits[line, column]`` of each place."""
    lines, columns = torch.tensor(places, dtype=torch.long, device=logits.device).reshape(-1, 2).T
    return logits[lines, columns].tolist()


def _negative_log_softmax(logits: torch.Tensor, places: list[tuple[int, int]]) -> list[float]:
    everything = logits.logsumexp(-1).tolist()
    return [everything[line] - value for (line, _), value in zip(places, _gather(logits, places), strict=True)]


def perplexities(records: list[dict]) -> dict[str, float]:
    """Exponentials of the mean negative log-likelihood: a token, and a word by ConvAI2's protocol."""
    total = Counter()
    for record in records:
        total.update(record)
    if total["unknown_words"]:
        logger.info("%s of the replies' %s words are not in the dictionary and left out of Word PPL",
                    f"{total['unknown_words']:,}", f"{total['words'] + total['unknown_words']:,}")
    return {"Token PPL": math.exp(total["nll"] / total["tokens"]),
            "Word PPL": math.exp(total["word_nll"] / total["words"]) if total["words"] else math.nan}


# ----------------------------------------------------------------------------------------------------------- F1


def replies(model: DoubleHeadsModel, dataset: TurnDataset, tokenizer, args: Namespace) -> Iterator[tuple[int, dict]]:
    """For each turn its number and the generated ``reply``; seeded by ``args.seed``."""
    torch.manual_seed(args.seed)
    for turns in LengthBatches(dataset.lengths()[0], args.batch_size):
        contexts = [fitted_context(model, *dataset.context(turn), dataset.special, args.max_length) for turn in turns]
        batch = generate_replies(model, contexts, dataset.special, args)
        for turn, reply in zip(turns.tolist(), batch, strict=True):
            yield turn, {"reply": tokenizer.decode(reply)}


def words(text: str) -> list[str]:
    """Words as ParlAI's F1 compares them: lower case, without punctuation and articles."""
    text = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(str.maketrans("", "", string.punctuation)))
    return text.split()


def f1_score(reply: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the reply's bag of words against the gold reply's."""
    reply_words, gold_words = words(reply), words(gold)
    common = sum((Counter(reply_words) & Counter(gold_words)).values())
    return 2 * common / (len(reply_words) + len(gold_words)) if common else 0.0


def reply_metrics(records: list[dict], split: Split, max_history: int) -> dict[str, float]:
    """F1 against the gold replies, and what the replies look like.

    Mean length in words; distinct-1 and distinct-2, different words and pairs of words over all of them (Li et al.
    2016); copied: the share of replies that stand word for word in what the model saw, persona or history.
    """
    f1, copied, lengths, grams = [], [], [], {1: Counter(), 2: Counter()}
    for turn, record in enumerate(records):
        f1.append(f1_score(record["reply"], split.texts("candidates", turn)[-1]))
        reply = split_words(record["reply"])
        seen = split.texts("persona", split.turn_dialog[turn]) + split.texts("history", turn)[-(2 * max_history + 1):]
        within = (f" {' '.join(split_words(text))} ".lower() for text in seen)
        copied.append(bool(reply) and any(f" {' '.join(reply)} ".lower() in text for text in within))
        lengths.append(len(reply))
        for n, counts in grams.items():
            counts.update(zip(*(reply[start:] for start in range(n)), strict=False))
    distinct = {f"Distinct-{n}": len(counts) / max(1, counts.total()) for n, counts in grams.items()}
    return {"F1": fmean(f1), "Words a reply": fmean(lengths), **distinct, "Copied": fmean(copied)}


# -------------------------------------------------------------------------------------------------- all of them


def evaluate(args: Namespace) -> dict[str, float]:
    """Run ``--eval_type`` over the validation split and return its figures by name."""
    model, tokenizer = load_checkpoint(args)
    table = get_dataset(tokenizer, args.dataset_path, args.dataset_cache)
    split = require_split(table, "valid", args.dataset_path)
    # Only the choice needs distractors: elsewhere a row is the context and the gold reply.
    dataset = TurnDataset(split, tokenizer, model.config.max_position_embeddings, max_history=args.max_history,
                          num_candidates=0 if args.eval_type == "hits@1" else 1)
    if too_long := dataset.lengths()[1]:
        logger.warning("%s turns exceed the model's positions and lose their oldest context", f"{too_long:,}")

    def collect(stream: Iterator[tuple[int, dict]], name: str = args.eval_type) -> list[dict]:
        """Records in the order of the turns, also written to ``--predictions``."""
        records: list[dict] = [{}] * len(dataset)
        for turn, record in tqdm(stream, total=len(dataset), desc=name, unit=" turns"):
            records[turn] = record
        if args.predictions:
            try:
                with open(args.predictions, "w", encoding="utf-8") as file:
                    file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            except OSError as error:
                raise InputError(f"--predictions {args.predictions}: cannot be written ({error.strerror}); "
                                 "name a file in a folder you may write to") from None
        return records

    if args.eval_type == "hits@1":
        return choice_metrics(collect(choice_scores(model, dataset, args)))
    if args.eval_type == "ppl":
        return perplexities(collect(gold_likelihoods(model, dataset, tokenizer, count_words(table), args)))

    model.to(half_dtype(args.device, args.fp16))  # decoding reads all weights for each token
    runs = []
    for seed in range(args.seed, args.seed + args.seeds):
        decoding = Namespace(**{**vars(args), "seed": seed})
        records = collect(replies(model, dataset, tokenizer, decoding), f"f1, seed {seed}")
        runs.append(reply_metrics(records, split, args.max_history))
    figures = {name: fmean(run[name] for run in runs) for name in runs[0]}
    if args.seeds > 1:
        figures["F1 spread"] = stdev(run["F1"] for run in runs)
    return figures


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--eval_type", default="hits@1", choices=["hits@1", "ppl", "f1"], help="the metric (default: %(default)s)")
    add_common_flags(parser, model_checkpoint="")
    add_decoding_flags(parser)
    add("--seeds", type=positive_number, default=1, metavar="N",
        help="f1: decode N times, with --seed, --seed + 1, …; report mean and standard deviation (default: 1)")
    add("--legacy_gpt2_words", action="store_true",
        help="ppl: look words up without their leading space, the mistake of the 2019 code with GPT-2")
    add("--batch_size", type=positive_number, default=16, help="turns at once (default: %(default)s)")
    add("--predictions", metavar="FILE", help="write what the figure is made of, a JSON line a turn")
    args = parser.parse_args()
    for name, value in evaluate(args).items():
        print(f"FINAL {name}: {value:.4g}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(main)
