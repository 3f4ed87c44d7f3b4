"""Collect pairs of replies to compare: two or more replies of one model to each of many contexts.

    python -m feedback.collect --model_checkpoint RUN --dataset_path DATA.json --pairs pairs.jsonl

Stopped and started again with the same flags, it goes on. A line of the file is one pair, with all that is needed to
make it again: see `collect`.
"""

import logging
import shlex
from argparse import ArgumentParser, Namespace
from collections import Counter
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cli import InputError, command, positive_number, require_memory
from corpora import require_split
from decoding import OPTIONS, Decoding, add_decoding_flags, fitted_context, generate_replies, load_checkpoint, readable
from feedback.pairs import append_json_lines, beginnings, is_pair, pair_name, read_json_lines, whole_dialog
from files import hash_tensors, replacing
from inputs import TurnDataset
from model import DoubleHeadsModel, half_dtype
from utils import add_common_flags, open_dataset

logger = logging.getLogger("feedback.collect")


def model_hash(model: DoubleHeadsModel) -> str:
    """A name for a model's weights: the same for the same weights, whatever file they came from."""
    return hash_tensors(sorted(model.state_dict().items()))[:16]


def decoders(args: Namespace) -> list[Decoding]:
    """The command line's decoder, or one a ``--decoder``, each the command line's with its own flags on top."""
    parser = ArgumentParser(prog="--decoder", add_help=False)
    add_decoding_flags(parser)
    parser.set_defaults(**{name: value for name, value in vars(args).items() if name in (*OPTIONS, "fp16")})
    return [Decoding.of(parser.parse_args(shlex.split(flags))) for flags in args.decoder or [""]]


def collect_pairs(args: Namespace) -> int:
    """Write ``--pairs``; returns how many there are in the file.

    A line has ``pair``, its name (`pair_name`); ``persona`` and ``history`` as texts; two ``replies``, each with its
    ``text``, token ``ids``, whether it ``ended`` by itself, and its number among the ``decoders``; and how it was made:
    ``checkpoint`` and ``model`` (`model_hash`), ``data``, ``split``, ``dialog`` and ``turn``, the dialog's
    `beginnings`, ``max_history``, the flags of each decoder, ``fp16``, and the ``batch`` of turns that was decoded at
    once under ``seed``.

    Batches are decoded in a fixed order, each under a seed of its own, so that what a kill interrupts can be made
    again: the last batch in the file is, when collecting goes on.
    """
    model, tokenizer = load_checkpoint(args.model_checkpoint, args.device, args.max_len,
                                       max_history=args.max_history)
    rows = min(args.contexts, args.batch_size) * args.replies
    # Of each reply that is decoded at once, the logits of the next token and their filtered copy.
    require_memory(2 * 4 * rows * len(tokenizer), f"--replies {args.replies} to {rows // args.replies} contexts a time")
    table = open_dataset(args, tokenizer)
    split = require_split(table, args.split, args.dataset or args.dataset_path)
    dataset = TurnDataset.for_model(model, split, tokenizer)
    if args.contexts > len(dataset):
        logger.warning("--contexts %s: the '%s' split has only %s turns", args.contexts, args.split, len(dataset))
    order = np.random.default_rng(args.seed).permutation(len(dataset))[:args.contexts].tolist()
    batches = [order[start:start + args.batch_size] for start in range(0, len(order), args.batch_size)]
    ways = decoders(args)
    made = {
        "checkpoint": args.model_checkpoint, "model": model_hash(model),
        "data": table.metadata["key"][:16], "split": args.split, "max_history": model.max_history,
        "decoders": [{name: value for name, value in asdict(way).items() if name not in ("seed", "logit_bias")}
                     for way in ways],  # logit_bias has no flag
        "fp16": args.fp16,
    }
    model.to(half_dtype(args.device, args.fp16))  # each token reads all weights
    longest = max(way.max_length for way in ways)

    path, skipped = Path(args.pairs), Counter()
    kept = _kept(path, made, batches, args.seed)
    for number in tqdm(range(_batches_done(kept, args.seed), len(batches)), desc="Collecting", unit=" batches"):
        turns = batches[number]
        lines = []
        contexts = [fitted_context(model, *dataset.context(turn), dataset.special, longest) for turn in turns]
        torch.manual_seed(args.seed + number)
        said: list[list[dict]] = [[] for _ in turns]  # of each context, its replies
        for way_number, way in enumerate(ways):
            ids = generate_replies(model, contexts, dataset.special, way, samples=args.replies)
            for place, reply in enumerate(ids):
                said[place // args.replies].append({
                    "text": readable(tokenizer, reply), "ids": reply, "ended": len(reply) < way.max_length,
                    "decoder": way_number})
        for turn, replies in zip(turns, said, strict=True):
            dialog = int(split.turn_dialog[turn])
            for pair in combinations(replies, 2):
                if pair[0]["text"] == pair[1]["text"]:
                    skipped["the same words"] += 1
                    continue
                record = made | {
                    "dialog": dialog, "turn": turn, "beginnings": beginnings(whole_dialog(split, dialog)),
                    "seed": args.seed + number, "batch": turns,
                    "persona": [] if model.no_persona else split.texts("persona", dialog),
                    "history": split.texts("history", turn)[-dataset.num_utterances:], "replies": list(pair)}
                lines.append({"pair": pair_name(record)} | record)
        append_json_lines(path, lines)
        kept += lines
    if skipped:
        logger.info("%s pairs were %s twice: nothing to compare", f"{skipped.total():,}", *skipped)
    logger.info("%s: %s pairs of %s contexts", path, f"{len(kept):,}", f"{len(order):,}")
    return len(kept)


def _kept(path: Path, made: dict, batches: list[list[int]], seed: int) -> list[dict]:
    """What an earlier start has left of whole batches; the file is cut there.

    Raises `InputError` when the file was made another way or holds anything else.
    """
    if not path.exists():
        return []
    lines = list(read_json_lines(path))
    if lines and lines[-1][1] is None:  # half written
        lines.pop()
    ours = {seed + place: batch for place, batch in enumerate(batches)}
    for number, record in lines:
        if record is None or not is_pair(record):
            raise InputError(f"{path}: line {number} is no pair; mend it, or name another file with --pairs")
        if other := [name for name, value in made.items() if record.get(name) != value and name != "checkpoint"]:
            raise InputError(f"{path}: line {number} was made with another {', '.join(other)}; give the same flags to "
                             "go on, or name another file with --pairs")
        if not isinstance(record.get("seed"), int) or record.get("batch") != ours.get(record["seed"], []):
            raise InputError(f"{path}: line {number} is of another choice of contexts; give the same --seed, "
                             "--contexts and --batch_size to go on, or name another file with --pairs")
    records = [record for _, record in lines]
    last = max((record["seed"] for record in records), default=0)
    records = [record for record in records if record["seed"] < last]
    with replacing(path) as unfinished:
        append_json_lines(unfinished, records)
    return records


def _batches_done(kept: list[dict], seed: int) -> int:
    return max((record["seed"] - seed + 1 for record in kept), default=0)


def parse_args(command_line: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(prog="python -m feedback.collect", description=__doc__.splitlines()[0])
    add_common_flags(parser, model_checkpoint="")
    add_decoding_flags(parser)
    add = parser.add_argument
    add("--pairs", default="pairs.jsonl", metavar="FILE", help="where the pairs go (default: %(default)s)")
    add("--split", default="valid", help="of the data, whose contexts are answered (default: %(default)s)")
    add("--contexts", type=positive_number, default=500, metavar="N", help="how many (default: %(default)s)")
    add("--replies", type=positive_number, default=2, metavar="N",
        help="a context and decoder, computed once; each two make a pair (default: %(default)s)")
    add("--decoder", action="append", metavar="FLAGS",
        help="compare decoders: decoding flags in quotes, '--temperature 0.7'; may be given several times")
    add("--batch_size", type=positive_number, default=32, help="contexts at once (default: %(default)s)")
    args = parser.parse_args(command_line)
    if args.replies * len(args.decoder or [""]) < 2:
        raise InputError("--replies 1 and one decoder: there is nothing to compare; ask for 2, or give two --decoder")
    return args


def main() -> None:
    collect_pairs(parse_args())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(main)
