"""Measure how time grows with candidates, context length, batch size and turns, and fit an exponent to each.

The exponent is the slope between the logarithms of size and time, once over all sizes and once over the largest
three, where fixed costs no longer hide it. `write_results.py` draws the curves.
"""

import gc
import itertools
import json
import random
import statistics
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from textbook import Bench, parse_args, report

import utils
from inputs import TurnDataset, collate, get_loader, pack_turn
from model import autocast


def median_seconds(work, repeats: int) -> float:
    """Return the median time of ``work()`` after a warm-up."""
    work()
    times = []
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Growth:
    """Measure the seconds for a given size; each method varies one quantity."""

    def __init__(self, bench: Bench, args: Namespace):
        self.bench, self.args = bench, args
        self.dataset = bench.dataset("valid", 20)
        self.rng = random.Random(args.seed)
        split = self.dataset.split
        self.replies = [split.token_ids("candidates", turn)[-1] for turn in range(split.num_turns)]

    def score(self, rows: list) -> float:
        """Time a forward pass with both heads in bfloat16."""
        batch = collate(rows, self.bench.special.pad)

        @torch.inference_mode()
        def forward() -> None:
            with autocast("cpu", "bf16"):
                self.bench.ours(**batch)

        return median_seconds(forward, self.args.repeats)

    def candidates(self, count: int) -> float:
        """Time two turns of median length with ``count`` candidates each."""
        lengths = self.dataset.lengths()[0]
        turns = np.argsort(lengths)[len(lengths) // 2:][:2].tolist()
        return self.score([pack_turn(*self.dataset.context(turn), self.rng.choices(self.replies, k=count),
                                     self.bench.special, 512) for turn in turns])

    def context(self, tokens: int) -> float:
        """Time four turns with ``tokens`` tokens of context and two candidates of 12 tokens."""
        ids = list(itertools.islice(itertools.cycle(itertools.chain.from_iterable(self.replies)), 13_000))
        rows = []
        for start in range(0, 4000, 1000):
            history = [ids[start:start + tokens - 2]]
            rows.append(pack_turn([], history, [ids[9000 + start:][:12], ids[9100 + start:][:12]],
                                  self.bench.special, 512))
        return self.score(rows)

    def batch(self, turns: int) -> float:
        """Time a batch of ``turns`` turns of similar length with two candidates."""
        dataset = self.bench.dataset("valid", 2)
        middle = np.argsort(dataset.lengths()[0])[len(dataset) // 2:][:turns].tolist()
        return self.score([dataset[turn] for turn in middle])

    def table(self, turns: int) -> float:
        """Time tokenising and caching of ``turns`` turns with two candidates, from dialogs drawn with replacement."""
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder, "data.json")
            write_turns(json.loads(Path(self.args.data).read_text())["train"], turns, data, self.args.seed)
            start = time.perf_counter()
            table = utils.get_dataset(self.bench.tokenizer, str(data), str(Path(folder, "cache")))
            seconds = time.perf_counter() - start
            assert table["train"].num_turns == turns
            # Batches from the table should take the same time for every size.
            start = time.perf_counter()
            dataset = TurnDataset(table["train"], self.bench.tokenizer, 512)
            loader = iter(get_loader(dataset, dataset.lengths()[0], 16, seed=self.args.seed))
            self.first_batch = time.perf_counter() - start
            start = time.perf_counter()
            for _ in range(50):
                next(loader)
            self.a_batch = (time.perf_counter() - start) / 50
            return seconds


def write_turns(entries: list[dict], turns: int, path: Path, seed: int) -> None:
    """Write a data file of exactly ``turns`` training turns, entry by entry to save memory."""
    rng, written, separator = random.Random(seed), 0, ""
    with open(path, "w") as file:
        file.write('{"valid": [], "train": [')
        while written < turns:
            entry = rng.choice(entries)
            kept = [{"history": turn["history"], "candidates": turn["candidates"][-2:]}
                    for turn in entry["utterances"][:turns - written]]
            personality = rng.sample(entry["personality"], len(entry["personality"]))
            file.write(separator + json.dumps({"personality": personality, "utterances": kept}))
            written, separator = written + len(kept), ","
        file.write("]}")


def slope(sizes: list[int], seconds: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def main() -> None:
    args = parse_args(__doc__.splitlines()[0], turns=1_000_000)
    bench = Bench(args)
    del bench.own
    bench.ours.eval()
    growth = Growth(bench, args)
    sweeps = {
        "candidates": (growth.candidates, [1, 2, 5, 10, 20, 50, 100], "candidates, two turns"),
        "context": (growth.context, [32, 64, 128, 256, 384, 496], "tokens of context, four turns"),
        "batch": (growth.batch, [1, 2, 4, 8, 16, 32, 64], "turns in a batch, two candidates"),
        "turns": (growth.table, [10 ** power for power in range(3, 7) if 10 ** power <= args.turns],
                  "turns tokenised and cached"),
    }
    rows = []
    for name, (work, sizes, label) in sweeps.items():
        seconds = []
        for size in sizes:
            seconds.append(work(size))
            print(f"{name} {size}: {seconds[-1]:.3f} s", flush=True)
        row = {"work": f"growth with {label}", "unit": "s at the largest size", "ours": seconds[-1],
               "exponent": slope(sizes, seconds), "exponent of the largest three": slope(sizes[-3:], seconds[-3:]),
               "curve": {"label": label, "sizes": sizes, "seconds": seconds}}
        if name == "turns":
            row |= {"first batch ready, s": growth.first_batch, "a batch of 16 turns, ms": 1e3 * growth.a_batch}
        rows.append(row)
    report("growth", args, rows)


if __name__ == "__main__":
    main()
