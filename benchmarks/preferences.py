"""Print the table and draw the curves of docs/results.md from the runs of recipes/feedback.sh.

    PYTHONPATH=. python benchmarks/preferences.py .demo/feedback

The true reward is the simulated annotator's rule. Its gain is in standard deviations among the baseline's replies.
"""

import json
import sys
from pathlib import Path
from statistics import fmean, stdev

ALGORITHMS, SEEDS = ("ppo", "rloo", "dpo"), (1, 2, 3)
ROOT = Path(__file__).parents[1]


def curve(work: Path, annotator: str, algorithm: str, seed: int) -> list[dict]:
    """Return a run's evaluations with their ``gain``; an empty list if the run has not ended."""
    name = f"rule_{algorithm}_{seed}" if annotator == "rule" else f"coin{seed}_{algorithm}_{seed}"
    if not (work / name / "model.safetensors").exists():
        return []
    records = [json.loads(line) for line in (work / name / "evaluations.jsonl").read_text().splitlines()]
    first = records[0]
    return [one | {"gain": (one["rule"] - first["rule"]) / first["rule_deviation"]} for one in records]


def main() -> None:
    work = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / ".demo" / "feedback")
    for who in ("rule", "coin1", "coin2", "coin3"):
        if (work / f"reward_{who}" / "reward.json").exists():
            figures = json.loads((work / f"reward_{who}" / "reward.json").read_text())
            low, high = figures["accuracy_interval"]
            print(f"reward model of {who}: {figures['accuracy']:.3f} of {figures['held_out_pairs']} held-out pairs, "
                  f"95 % {low:.3f} to {high:.3f}; calibration error {figures['calibration_error']:.3f}")
    print("\n| answers | algorithm | gain in deviations, seeds 1, 2, 3 (KL, nats per reply) | mean | replies that end "
          "|\n|---|---|---|---|---|")
    curves = {}
    for annotator in ("rule", "coin"):
        for algorithm in ALGORITHMS:
            runs = [curve(work, annotator, algorithm, seed) for seed in SEEDS]
            curves[annotator, algorithm] = [run for run in runs if run]
            ends = [run[-1] for run in runs if run]
            if not ends:
                continue
            cells = ", ".join(f"{run[-1]['gain']:+.2f} ({run[-1]['kl']:.1f})" if run else "not run" for run in runs)
            gains = [end["gain"] for end in ends]
            spread = f" ± {stdev(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
            print(f"| {annotator} | {algorithm.upper()} | {cells} | {fmean(gains):+.2f}{spread} | "
                  f"{fmean(run[0]['ended'] for run in runs if run):.2f}, then "
                  f"{', '.join(format(end['ended'], '.2f') for end in ends)} |")
    draw(curves, ROOT / "docs" / "preferences.png")


def draw(curves: dict[tuple[str, str], list[list[dict]]], path: Path) -> None:
    """Draw gain and divergence over the steps of every run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(ALGORITHMS), figsize=(11, 5.6), sharex="col", sharey="row")
    for column, algorithm in enumerate(ALGORITHMS):
        for annotator, colour, label in (("rule", "tab:blue", "by the rule"), ("coin", "tab:gray", "coin flips")):
            for number, run in enumerate(curves[annotator, algorithm]):
                for row, field in enumerate(("gain", "kl")):
                    axes[row][column].plot([one["step"] for one in run], [one[field] for one in run], color=colour,
                                           label=None if number else label)
        axes[0][column].set_title(algorithm.upper())
        axes[0][column].axhline(1, color="tab:green", linewidth=0.8, linestyle="--")
        axes[0][column].axhline(0, color="black", linewidth=0.5)
        axes[1][column].set_xlabel("step")
    axes[0][0].set_ylabel("true reward, gain\nin deviations")
    axes[1][0].set_ylabel("KL from the baseline,\nnats per reply")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
