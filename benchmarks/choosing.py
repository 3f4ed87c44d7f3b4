"""Measure hits@1 with 20 candidates in turns per second, for our code and for the textbook path."""

import itertools

import torch
from textbook import Bench, alternate, close, parse_args, report

from inputs import collate, get_loader
from model import autocast


@torch.inference_mode()
def main() -> None:
    args = parse_args(__doc__, turns=8)
    bench = Bench(args)
    bench.ours.eval(), bench.own.eval()
    dataset = bench.dataset("valid", 20)
    lengths, _ = dataset.lengths()
    width = bench.longest(dataset)

    turn = len(dataset) // 3
    ours = bench.ours(**collate([dataset[turn]], bench.special.pad)).mc_logits[0]
    own = bench.own(**bench.padded(dataset, [turn], width)).mc_logits[0]
    close((ours - own).abs().max().item(), 0.0, 1e-4, "the scores")
    if ours.argsort().tolist() != own.argsort().tolist():
        raise SystemExit("the ranking differs; nothing was timed")

    batches = itertools.cycle(list(itertools.islice(get_loader(dataset, lengths, args.turns, seed=args.seed), 20)))
    turns = itertools.cycle(torch.randperm(len(dataset)).tolist())

    def score(half: str) -> None:
        with autocast("cpu", half):
            bench.ours(**next(batches))

    seconds = alternate({"float32": lambda: score(""), "bfloat16": lambda: score("bf16"),
                         "reference": lambda: bench.own(**bench.padded(dataset, [next(turns)], width))}, args.repeats)
    report("choosing", args, [
        {"work": f"hits@1, 20 candidates, {name}", "unit": "turns/s", "ours": args.turns / seconds[name],
         "reference": 1 / seconds["reference"], "ratio": args.turns * seconds["reference"] / seconds[name],
         "reference padded to": width} for name in ("float32", "bfloat16")])


if __name__ == "__main__":
    main()
