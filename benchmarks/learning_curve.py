"""Tell how hits@1 and perplexity change with the number of training dialogs, and what more dialogs would give.

    for n in 295 589 1178 2356; do DIALOGS=$n recipes/persona.sh PERSONA_CHAT.json; done
    PYTHONPATH=. python benchmarks/learning_curve.py .demo/persona-*/

Each folder has the data (chat.json) and the predictions (hits@1.jsonl, ppl.jsonl) that the recipe leaves there. A
power of the number of dialogs is fitted to the share of wrong choices (1 - hits@1) and to the perplexities (Hestness et
al. 2017, "Deep learning scaling is predictable, empirically"). Intervals are those of 95 % of 10,000 resamples of the
validation dialogs, the same for all points. They do not contain how much another seed or another choice of training
dialogs would change.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib import pyplot

from cli import InputError, command, positive_number
from feedback.pairs import read_json_lines
from metrics import gold_rank_by_words

METRICS = {"hits@1": "share of turns", "PPL per token": "perplexity", "PPL per word": "perplexity"}


def sums(folder: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Return the number of training dialogs, and each metric's sum and count per validation dialog, (2, dialogs)."""
    data = json.loads((folder / "chat.json").read_text("utf-8"))
    turns = [(number, turn["candidates"]) for number, dialog in enumerate(data["valid"])
             for turn in dialog["utterances"]]
    dialog, count = np.array([number for number, _ in turns]), len(data["valid"])
    chosen, told = ([one for _, one in read_json_lines(folder / f"{name}.jsonl")] for name in ("hits@1", "ppl"))
    if not len(turns) == len(chosen) == len(told):
        raise InputError(f"{folder} has predictions for {len(chosen):,} and {len(told):,} turns, but chat.json has "
                         f"{len(turns):,}; run DIALOGS=… recipes/persona.sh again")
    columns = {"hits@1": ([gold_rank_by_words(one["scores"], texts) == 1
                           for one, (_, texts) in zip(chosen, turns, strict=True)], [1] * len(turns))}
    for name, total, number in (("PPL per token", "nll", "tokens"), ("PPL per word", "word_nll", "words")):
        columns[name] = ([one[total] for one in told], [one[number] for one in told])
    return len(data["train"]), {name: np.stack([np.bincount(dialog, column, count) for column in both])
                                for name, both in columns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path,
                        help="folders of recipes/persona.sh, one per number of dialogs")
    parser.add_argument("--to", type=positive_number, nargs="+", default=[8939, 17878], metavar="N",
                        help="numbers of dialogs to extrapolate to (default: ConvAI2, with the replies of one speaker, "
                             "and of both, as in the published file)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the curves there")
    parser.add_argument("--seed", type=int, default=42, help="seed of the resamples (default: %(default)s)")
    args = parser.parse_args()
    points = sorted((sums(folder) for folder in args.folders), key=lambda point: point[0])
    sizes = np.array([size for size, _ in points])
    if len(set(sizes)) < 3:
        raise InputError("a curve needs folders of three or more different numbers of dialogs")

    number = points[0][1]["hits@1"].shape[1]
    draws = np.random.default_rng(args.seed).multinomial(number, np.full(number, 1 / number), size=10_000)
    weights = np.concatenate([np.ones((1, number)), draws])  # the first row is the validation split itself
    wanted = np.array([*sizes, *args.to])
    plots = pyplot.subplots(1, len(METRICS), figsize=(11, 3.6), layout="constrained")[1]
    for plot, (name, unit) in zip(plots, METRICS.items(), strict=True):
        values = np.stack([weights @ point[name][0] / (weights @ point[name][1]) for _, point in points])
        falling = values if unit == "perplexity" else np.log(1 - values)  # the mean of a perplexity is a logarithm
        slope, start = np.polyfit(np.log2(sizes), falling, 1)
        power = np.exp(slope * np.log2(wanted)[:, None] + start)
        if unit == "perplexity":
            values = np.exp(values)
        else:
            power = 1 - power
        for size, row in zip(wanted, [*values, *power[len(sizes):]], strict=True):
            print(f"{name:13} {size:6,} dialogs  {row[0]:6.3f}  ({' to '.join(f'{end:.3f}' for end in ends(row))})"
                  + "  by the power law" * (size not in sizes))
        step = np.exp(slope)
        print(f"{name:13} each doubling multiplies {'it' if unit == 'perplexity' else 'the wrong choices'} by "
              f"{step[0]:.3f} ({' to '.join(f'{end:.3f}' for end in ends(step))})")
        plot.plot(sizes, values[:, 0], "o", label="measured")
        plot.vlines(sizes, *np.quantile(values[:, 1:], [0.025, 0.975], 1), color="C0")
        plot.plot(wanted, power[:, 0], "C1", label="power law")
        plot.fill_between(wanted, *np.quantile(power[:, 1:], [0.025, 0.975], 1), color="C1", alpha=0.2)
        plot.set(xscale="log", title=name, xlabel="training dialogs", ylabel=unit, xticks=wanted,
                 xticklabels=[f"{size:,}" for size in wanted])
        plot.tick_params("x", rotation=45)
        plot.minorticks_off()
        plot.grid(alpha=0.3)
    plots[0].legend()
    if args.plot:
        pyplot.savefig(args.plot, dpi=100)


def ends(row: np.ndarray) -> list[float]:
    """Return the ends of the 95 % interval of resampled values; the first value is not a resample."""
    return np.quantile(row[1:], [0.025, 0.975]).tolist()


if __name__ == "__main__":
    command(main)
