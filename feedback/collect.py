"""Collect pairs of replies to compare: a model decodes two or more replies to each of many contexts.

    python -m feedback.collect --model_checkpoint RUN --dataset_path DATA.json --pairs pairs.jsonl

After an interruption, the same command continues. Each line of the file is a pair with everything needed to decode it
again; `collect_pairs` describes the fields.
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
from model import DoubleHeadsModel
from packing import prepare_to_decode_
from utils import add_common_flags, open_dataset

logger = logging.getLogger("feedback.collect")


def model_hash(model: DoubleHeadsModel) -> str:
    """Return a hash of a model's weights; it does not depend on the file format."""
    return hash_tensors(sorted(model.state_dict().items()))[:16]


def decoders(args: Namespace) -> list[Decoding]:
    """Return the options of each ``--decoder``; the command line's options are its defaults, or the only decoder."""
    parser = ArgumentParser(prog="--decoder", add_help=False)
    add_decoding_flags(parser)
    parser.set_defaults(**{name: value for name, value in vars(args).items() if name in (*OPTIONS, "fp16")})
    return [Decoding.of(parser.parse_args(shlex.split(flags))) for flags in args.decoder or [""]]


def collect_pairs(args: Namespace) -> int:
    """Write ``--pairs``; return the number of pairs in the file.

    Each line has its name ``pair`` (`pair_name`), the texts ``persona`` and ``history``, and two ``replies``: ``text``,
    token ``ids``, whether the reply ``ended`` by itself, and the number of its ``decoder``. The other fields say how
    the pair was made: ``checkpoint``, ``model`` (`model_hash`), ``data``, ``split``, ``dialog``, ``turn``, the dialog's
    `beginnings`, ``max_history``, the options of all ``decoders``, ``fp16``, and the ``batch`` of turns that was
    decoded under the ``seed``.

    Batches are decoded in a fixed order, each with its own seed, so that an interrupted batch can be repeated. When
    collecting continues, the last batch in the file is decoded again.
    """
    model, tokenizer = load_checkpoint(args.model_checkpoint, args.device, args.max_len,
                                       max_history=args.max_history)
    rows = min(args.contexts, args.batch_size) * args.replies
    # Each reply of a batch needs the logits of its next token and a filtered copy of them.
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
    prepare_to_decode_(model, args.device, args.fp16)  # each token reads all weights
    longest = max(way.max_length for way in ways)

    path, skipped = Path(args.pairs), Counter()
    kept = _kept(path, made, batches, args.seed)
    for number in tqdm(range(_batches_done(kept, args.seed), len(batches)), desc="Collecting", unit=" batches"):
        turns = batches[number]
        lines = []
        contexts = [fitted_context(model, *dataset.context(turn), dataset.special, longest) for turn in turns]
        torch.manual_seed(args.seed + number)
        said: list[list[dict]] = [[] for _ in turns]  # replies by context
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
        logger.info("%s pairs were %s twice and are skipped", f"{skipped.total():,}", *skipped)
    logger.info("%s: %s pairs of %s contexts", path, f"{len(kept):,}", f"{len(order):,}")
    return len(kept)


def _kept(path: Path, made: dict, batches: list[list[int]], seed: int) -> list[dict]:
    """Return the pairs of complete batches in the file, and delete all others from it.

    Raises `InputError` if the file was made with other flags or contains anything else.
    """
    if not path.exists():
        return []
    lines = list(read_json_lines(path))
    if lines and lines[-1][1] is None:  # half written
        lines.pop()
    ours = {seed + place: batch for place, batch in enumerate(batches)}
    for number, record in lines:
        if record is None or not is_pair(record):
            raise InputError(f"{path}: line {number} is not a pair; correct it, or name another file with --pairs")
        if other := [name for name, value in made.items() if record.get(name) != value and name != "checkpoint"]:
            raise InputError(f"{path}: line {number} was made with another {', '.join(other)}; use the same flags to "
                             "continue, or name another file with --pairs")
        if not isinstance(record.get("seed"), int) or record.get("batch") != ours.get(record["seed"], []):
            raise InputError(f"{path}: line {number} belongs to another choice of contexts; use the same --seed, "
                             "--contexts and --batch_size to continue, or name another file with --pairs")
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
    add("--pairs", default="pairs.jsonl", metavar="FILE", help="file to write (default: %(default)s)")
    add("--split", default="valid", help="split of the data to take contexts from (default: %(default)s)")
    add("--contexts", type=positive_number, default=500, metavar="N", help="number of contexts (default: %(default)s)")
    add("--replies", type=positive_number, default=2, metavar="N",
        help="replies per context and decoder; any two of a context make a pair (default: %(default)s)")
    add("--decoder", action="append", metavar="FLAGS",
        help="compare decoders: decoding flags in quotes, '--temperature 0.7'; may be given several times")
    add("--batch_size", type=positive_number, default=32, help="contexts to decode at once (default: %(default)s)")
    args = parser.parse_args(command_line)
    if args.replies * len(args.decoder or [""]) < 2:
        raise InputError("--replies 1 with one decoder leaves nothing to compare; use --replies 2 or two --decoder")
    return args


def main() -> None:
    collect_pairs(parse_args())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    command(main)
