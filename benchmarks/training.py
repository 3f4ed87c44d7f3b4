"""Training: turns a second of one optimizer step, ours against the textbook path, with 2 and 4 candidates.

The textbook path pads to the longest row of the data set: 192 tokens in the quarter of PERSONA-CHAT at hand, 282 in the
whole of it. Both are timed.
"""

import itertools
from argparse import Namespace

import torch
from textbook import Bench, alternate, close, parse_args, report

from inputs import collate, get_loader
from model import autocast


def learn(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One optimizer step."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def measure(bench: Bench, args: Namespace, candidates: int) -> list[dict]:
    """Rows for one number of candidates."""
    dataset = bench.dataset("train", candidates)
    lengths, _ = dataset.lengths()
    width = bench.longest(dataset)

    # The same losses first, dropout off.
    picked = list(range(0, 4000, 1000))
    with torch.no_grad():
        ours = bench.ours.eval()(**collate([dataset[turn] for turn in picked], bench.special.pad))
        own = bench.own.eval()(**bench.padded(dataset, picked, width))
    close(ours.lm_loss.item(), own.loss.item(), 1e-4, "lm_loss")
    close(ours.mc_loss.item(), own.mc_loss.item(), 1e-4, "mc_loss")

    bench.ours.train(), bench.own.train()
    settings = dict(lr=6.25e-5, eps=1e-6, weight_decay=0.0)
    our_optimizer = torch.optim.AdamW(bench.ours.parameters(), fused=True, **settings)
    own_optimizer = torch.optim.AdamW(bench.own.parameters(), fused=False, foreach=False, **settings)
    batches = itertools.cycle(list(itertools.islice(get_loader(dataset, lengths, args.turns, seed=args.seed), 20)))
    turns = itertools.cycle(torch.randperm(len(dataset)).tolist())

    def our_step(half: str) -> None:
        with autocast("cpu", half):
            out = bench.ours(**next(batches))
        learn(our_optimizer, out.lm_loss + out.mc_loss)

    def textbook_step(width: int) -> None:
        out = bench.own(**bench.padded(dataset, list(itertools.islice(turns, args.reference_turns)), width))
        learn(own_optimizer, out.loss + out.mc_loss)

    seconds = alternate({
        "float32": lambda: our_step(""), "bfloat16": lambda: our_step("bf16"),
        width: lambda: textbook_step(width), args.published_width: lambda: textbook_step(args.published_width),
    }, args.repeats)
    return [{"work": f"training, {candidates} candidates, {name}, textbook padded to {padded}", "unit": "turns/s",
             "ours": args.turns / seconds[name], "reference": args.reference_turns / seconds[padded],
             "ratio": args.turns / seconds[name] / args.reference_turns * seconds[padded]}
            for padded in (width, args.published_width) for name in ("float32", "bfloat16")]


def main() -> None:
    args = parse_args(__doc__.splitlines()[0], turns=16, reference_turns=4, published_width=282)
    # Models of their own for each: the comparison needs both sides untrained.
    report("training", args, [row for candidates in (2, 4) for row in measure(Bench(args), args, candidates)])


if __name__ == "__main__":
    main()
