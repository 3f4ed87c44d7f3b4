"""Measure the recipe of 2019 on this machine: turns per second, share of the peak, and projected hours.

The recipe, 3 epochs over 131,438 turns with 4 candidates and 2 permutations, took an hour on eight V100s. The peak is
this device's best speed in large bfloat16 matrix products. The operations of packed rows are counted, padding included:
6 per weight of the body and position, and 6 per weight of the vocabulary and gold token.
"""

import itertools
import time
from argparse import Namespace

import torch
from textbook import Bench, parse_args, report
from training import learn

from inputs import IGNORED, get_loader
from model import autocast

TURNS = 131_438 * 2 * 3


def peak(device: str, dtype: torch.dtype = torch.bfloat16) -> float:
    """Measure the operations per second of large matrix products, the best of ten."""
    size = 8192 if device != "cpu" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * size ** 3 / (time.perf_counter() - start))
    return best


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def measure(bench: Bench, args: Namespace, compiled: bool) -> dict:
    """Time training steps over consecutive batches, including building and moving them; return a row of results."""
    model = bench.ours.to(args.device).train()
    if compiled:
        model.transformer.compile(dynamic=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6.25e-5, fused=True)
    dataset = bench.dataset("train", 4)
    lengths, _ = dataset.lengths()
    loader = get_loader(dataset, lengths, args.turns, seed=args.seed, num_workers=args.workers,
                        pin_memory=args.device != "cpu")
    body = sum(parameter.numel() for block in model.transformer.h for parameter in block.parameters())
    vocabulary = model.lm_head.weight.numel()
    work = turns = 0
    start = None
    for number, batch in enumerate(itertools.islice(loader, args.warm_up + args.repeats)):
        if number == args.warm_up:
            synchronize(args.device)
            start, work, turns = time.perf_counter(), 0, 0
        work += 6 * (body * batch["input_ids"].numel() + vocabulary * int((batch["labels"] != IGNORED).sum()))
        turns += len(batch["input_ids"])
        with autocast(args.device, "bf16"):
            out = model(**{name: tensor.to(args.device, non_blocking=True) for name, tensor in batch.items()})
        learn(optimizer, out.lm_loss + out.mc_loss)
    synchronize(args.device)
    seconds = time.perf_counter() - start
    top = peak(args.device)
    return {"work": f"full recipe on {args.device}, 4 candidates, bfloat16{', compiled' if compiled else ''}",
            "unit": "turns/s", "ours": turns / seconds, "share of the bfloat16 peak": work / seconds / top,
            "peak, TFLOP/s": top / 1e12, "hours for 3 epochs of 2 permutations": TURNS * seconds / turns / 3600}


def main() -> None:
    cuda = torch.cuda.is_available()
    args = parse_args(__doc__.splitlines()[0], device="cuda" if cuda else "cpu", turns=64 if cuda else 16, workers=0,
                      warm_up=20 if cuda else 2)
    report("full_recipe", args, [measure(Bench(args), args, compiled) for compiled in ((False, True) if cuda else
                                                                                     (False,))])


if __name__ == "__main__":
    main()
