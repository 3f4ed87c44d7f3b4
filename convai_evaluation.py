"""The ConvAI2 metrics over the validation split: hits@1, perplexity, F1.

    python convai_evaluation.py --eval_type hits@1 --model_checkpoint RUN
"""

import json
import logging
import math
import re
import string
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from tqdm import tqdm

from corpora import InputError, command, require_split
from inputs import LengthBatches, TurnDataset, get_loader
from interact import add_decoding_flags, fitted_context, generate_replies, load_for_decoding
from model import HALF, DoubleHeadsModel, autocast
from utils import add_common_flags, get_dataset, positive_number

logger = logging.getLogger("convai_evaluation")


def choice_scores(model: DoubleHeadsModel, dataset: TurnDataset, args: Namespace) -> Iterator[tuple[int, dict]]:
    """hits@1: for each turn its number and ``scores``, one a candidate in the data's order (gold last)."""
    for turns, out in _scored(model, dataset, args):
        for turn, logits in zip(turns, out.mc_logits.tolist(), strict=True):
            yield turn, {"scores": [score for score in logits if score > -math.inf]}


def gold_likelihoods(model: DoubleHeadsModel, dataset: TurnDataset, args: Namespace) -> Iterator[tuple[int, dict]]:
    """Perplexity: for each turn its number and the gold reply's ``nll`` in nats over ``tokens``, ``<eos>`` included."""
    for turns, out in _scored(model, dataset, args):
        for turn, nll, tokens in zip(turns, out.nll.tolist(), out.tokens.tolist(), strict=True):
            yield turn, {"nll": nll, "tokens": tokens}


def replies(model: DoubleHeadsModel, dataset: TurnDataset, tokenizer, args: Namespace) -> Iterator[tuple[int, dict]]:
    """F1: for each turn its number and the generated ``reply``."""
    torch.manual_seed(args.seed)
    for turns in LengthBatches(dataset.lengths()[0], args.batch_size):
        contexts = [fitted_context(model, *dataset.context(turn), dataset.special, args.max_length) for turn in turns]
        with autocast(args.device, args.fp16):
            batch = generate_replies(model, contexts, dataset.special, args)
        for turn, reply in zip(turns.tolist(), batch, strict=True):
            yield turn, {"reply": tokenizer.decode(reply)}


@torch.inference_mode()
def _scored(model: DoubleHeadsModel, dataset: TurnDataset, args: Namespace) -> Iterator[tuple]:
    """Turn numbers and the model's output, batch by batch."""
    loader = get_loader(dataset, dataset.lengths()[0], args.batch_size)
    for turns, batch in zip(loader.batch_sampler, loader, strict=True):
        with autocast(args.device, args.fp16):
            yield turns.tolist(), model(**{name: tensor.to(args.device) for name, tensor in batch.items()})


def words(text: str) -> list[str]:
    """Words as ParlAI's F1 compares them: lower case, without punctuation and articles."""
    text = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(str.maketrans("", "", string.punctuation)))
    return text.split()


def f1_score(reply: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the reply's bag of words against the gold reply's."""
    reply_words, gold_words = words(reply), words(gold)
    common = sum((Counter(reply_words) & Counter(gold_words)).values())
    return 2 * common / (len(reply_words) + len(gold_words)) if common else 0.0


def evaluate(args: Namespace) -> dict[str, float]:
    """Run ``--eval_type`` over the validation split and return its figures by name."""
    model, tokenizer = load_for_decoding(args)
    table = get_dataset(tokenizer, args.dataset_path, args.dataset_cache)
    split = require_split(table, "valid", args.dataset_path)
    # Only the choice needs distractors: elsewhere a row is the context and the gold reply.
    dataset = TurnDataset(split, tokenizer, model.config.max_position_embeddings, max_history=args.max_history,
                          num_candidates=0 if args.eval_type == "hits@1" else 1)
    if too_long := dataset.lengths()[1]:
        logger.warning("%s turns exceed the model's positions and lose their oldest context", f"{too_long:,}")
    if args.eval_type == "f1":
        stream = replies(model, dataset, tokenizer, args)
    else:
        stream = (choice_scores if args.eval_type == "hits@1" else gold_likelihoods)(model, dataset, args)
    records: list[dict] = [{}] * len(dataset)
    for turn, record in tqdm(stream, total=len(dataset), desc=args.eval_type, unit=" turns"):
        records[turn] = record
    if args.predictions:
        try:
            with open(args.predictions, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        except OSError as error:
            raise InputError(f"--predictions {args.predictions}: cannot be written ({error.strerror}); "
                             "name a file in a folder you may write to") from None
    if args.eval_type == "hits@1":  # a tie counts against the model
        return {"Hits@1": np.mean([all(record["scores"][-1] > other for other in record["scores"][:-1])
                                   for record in records])}
    if args.eval_type == "ppl":
        nll = sum(record["nll"] for record in records) / sum(record["tokens"] for record in records)
        return {"PPL": math.exp(nll)}
    gold = [split.texts("candidates", turn)[-1] for turn in range(len(records))]
    return {"F1": np.mean([f1_score(record["reply"], reply) for record, reply in zip(records, gold, strict=True)])}


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--eval_type", default="hits@1", choices=["hits@1", "ppl", "f1"], help="the metric (default: %(default)s)")
    add_common_flags(parser, model_checkpoint="")
    add_decoding_flags(parser)
    add("--batch_size", type=positive_number, default=16, help="turns at once (default: %(default)s)")
    add("--fp16", default="", choices=["", "O0", *HALF], help="half precision, as in train.py (default: none)")
    add("--predictions", metavar="FILE", help="write what the figure is made of, a JSON line a turn")
    args = parser.parse_args()
    for name, value in evaluate(args).items():
        print(f"FINAL {name}: {value:.4g}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(main)
