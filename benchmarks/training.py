"""Measure training in turns per second with 2 and 4 candidates, for our code and for the textbook path.

Both sides make one optimizer step of 32 turns, the default of 2019: the textbook path in eight batches of four, as in
2019, and our code in one batch. The textbook path pads to the longest row of the data set: 192 tokens in the quarter of
PERSONA-CHAT at hand, 282 in all of PERSONA-CHAT. Both widths are timed. The textbook's batches all have this length,
whereas ours differ, so the timed batches are spread evenly over an epoch's batches in the order of their lengths.
"""

import itertools
import statistics
from argparse import Namespace

import numpy as np
import torch
from textbook import Bench, alternate, close, parse_args, report

from inputs import LengthBatches, collate
from model import autocast


def learn(optimizer: torch.optim.Optimizer, loss: torch.Tensor | None = None) -> None:
    """Make an optimizer step, after the backward pass of ``loss`` if it is given."""
    if loss is not None:
        loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def typical_batches(dataset, turns: int, seed: int, count: int, pad: int) -> list[dict[str, torch.Tensor]]:
    """Return ``count`` of an epoch's batches, spread evenly over their lengths."""
    lengths = dataset.lengths()[0]
    batches = sorted(LengthBatches(lengths, turns, seed), key=lambda batch: lengths[batch].max())
    places = ((np.arange(count) + 0.5) / count * len(batches)).astype(int)
    return [collate([dataset[turn] for turn in batches[place]], pad) for place in places]


def measure(bench: Bench, args: Namespace, candidates: int) -> list[dict]:
    """Measure one number of candidates, and return rows of results."""
    dataset = bench.dataset("train", candidates)
    width = bench.longest(dataset)

    # First check that the losses agree, without dropout.
    picked = [quarter * len(dataset) // 4 for quarter in range(4)]
    with torch.no_grad():
        ours = bench.ours.eval()(**collate([dataset[turn] for turn in picked], bench.special.pad))
        own = bench.own.eval()(**bench.padded(dataset, picked, width))
    close(ours.lm_loss.item(), own.loss.item(), 1e-4, "lm_loss")
    close(ours.mc_loss.item(), own.mc_loss.item(), 1e-4, "mc_loss")

    bench.ours.train(), bench.own.train()
    settings = dict(lr=6.25e-5, eps=1e-6, weight_decay=0.0)
    our_optimizer = torch.optim.AdamW(bench.ours.parameters(), fused=True, **settings)
    own_optimizer = torch.optim.AdamW(bench.own.parameters(), fused=False, foreach=False, **settings)
    batches = typical_batches(dataset, args.turns, args.seed, args.repeats, bench.special.pad)
    batches = {name: itertools.cycle([batches[-1], *batches]) for name in ("", "bf16")}  # the first is a warm-up
    turns = itertools.cycle(torch.randperm(len(dataset)).tolist())

    def our_step(half: str) -> None:
        with autocast("cpu", half):
            out = bench.ours(**next(batches[half]))
        learn(our_optimizer, out.lm_loss + out.mc_loss)

    def textbook_batch(width: int) -> None:
        out = bench.own(**bench.padded(dataset, list(itertools.islice(turns, args.reference_turns)), width))
        (out.loss + out.mc_loss).backward()

    seconds = alternate({
        "float32": lambda: our_step(""), "bfloat16": lambda: our_step("bf16"),
        width: lambda: textbook_batch(width), args.published_width: lambda: textbook_batch(args.published_width),
        "textbook's optimizer": lambda: learn(own_optimizer),
    }, args.repeats, statistics.fmean)
    rows = []
    for padded in (width, args.published_width):
        reference = args.turns / args.reference_turns * seconds[padded] + seconds["textbook's optimizer"]
        rows += [{"work": f"training, {candidates} candidates, {name}, textbook padded to {padded}", "unit": "turns/s",
                  "ours": args.turns / seconds[name], "reference": args.turns / reference,
                  "ratio": reference / seconds[name]} for name in ("float32", "bfloat16")]
    return rows


def main() -> None:
    args = parse_args(__doc__.splitlines()[0], turns=32, reference_turns=4, published_width=282)
    # New models for each, because the comparison needs both sides untrained.
    report("training", args, [row for candidates in (2, 4) for row in measure(Bench(args), args, candidates)])


if __name__ == "__main__":
    main()
