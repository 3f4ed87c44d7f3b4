"""Measure peak memory of a training step and of hits@1 with 20 candidates, for our code and for the textbook path.

Each side runs in its own process. The peak is the largest resident memory during the work minus the resident memory
before it, which includes the weights (470 MB). Gradients and the optimizer's moments are allocated in the first step.
"""

import ctypes
import gc
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import torch
from textbook import Bench, parse_args, report
from training import learn

from inputs import collate
from model import autocast


def resident(field: str) -> float:
    """Return resident memory in GiB: ``VmRSS`` is the current, ``VmHWM`` the largest value."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**20


def measure(args: Namespace) -> float:
    """Return the peak, in GiB, of one side's work on the longest rows of the data set."""
    work, precision = args.side.split()
    bench = Bench(args)
    training = work == "training"
    dataset = bench.dataset("train" if training else "valid", 2 if training else 20)
    turns = dataset.lengths()[0].argsort()[-args.turns if training else -1:].tolist()
    if precision == "textbook":
        model = bench.own.train(training)
        del bench.ours
        batch = bench.padded(dataset, turns, bench.longest(dataset))
    else:
        model = bench.ours.train(training)
        del bench.own
        batch = collate([dataset[turn] for turn in turns], bench.special.pad)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6.25e-5, fused=precision != "textbook")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise the work would find room that loading has left
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    with autocast("cpu", "bf16" if precision == "bfloat16" else ""), torch.set_grad_enabled(training):
        out = model(**batch)
    if training:
        learn(optimizer, (out.loss if precision == "textbook" else out.lm_loss) + out.mc_loss)
    return resident("VmHWM") - before


def main() -> None:
    args = parse_args(__doc__.splitlines()[0], turns=4, side="")
    if args.side:  # in its own process
        print(measure(args))
        return
    names = {"training": f"memory of a training step, {args.turns} turns of 2 candidates",
             "choosing": "memory of hits@1, a turn of 20 candidates"}
    rows = []
    for work, name in names.items():
        peaks = {}
        for precision in ("textbook", "float32", "bfloat16"):
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", f"{work} {precision}"],
                                  check=True, capture_output=True, text=True)
            peaks[precision] = float(done.stdout.split()[-1])
        rows += [{"work": f"{name}, {precision}", "unit": "GiB", "ours": peaks[precision],
                  "reference": peaks["textbook"], "ratio": peaks["textbook"] / peaks[precision]}
                 for precision in ("float32", "bfloat16")]
    report("memory", args, rows)


if __name__ == "__main__":
    main()
