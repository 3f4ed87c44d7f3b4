"""Write benchmarks/RESULTS.md and growth.png from what the benchmarks left in benchmarks/results."""

import json

from matplotlib import pyplot
from textbook import RESULTS, ROOT

HEAD = """# Benchmark results

Written by `make bench`; do not edit. Rows of benchmarks that were not run again stay. Ours against the textbook path:
transformers' own `OpenAIGPTDoubleHeadsModel` used the 2019 way (float32, every candidate a full row padded to the
data set's longest, all logits, no cache), openai-gpt's size (117 M parameters, random weights), real PERSONA-CHAT
turns with redrawn distractors. Each benchmark checks that both sides compute the same before it times them,
alternates them, and takes medians; training takes the mean over batches of an epoch's typical lengths.

"""

HEADER = "| work | ours | textbook | unit | ratio | more |"

GROWTH = """
## Growth

![time against candidates, context length, batch size and turns](growth.png)

A packed row's attention is over all its positions, and masks what a candidate may not see: its share grows with the
square of candidates and of context length, while everything else grows in proportion. Small sizes cost more than their
share because every weight is read whatever the size. A table of turns grows more slowly than its turns because strings
repeat and each is tokenised once; batches come out of it at one speed whatever its size.

## Where a training step goes

Mostly into matrix products, which run near the speed this machine has for them: see the rows "where a training step
goes" above. bfloat16 can win over float32 no more than the machine multiplies faster in it. Machines of one name
differ in that: the rows of training, of where a step goes and of the web server are of one whose large products run at
0.94 TFLOP/s in bfloat16 and 0.22 in float32, all others of one that made 0.43 in bfloat16. Neither has AMX.
"""


def draw(curves: list[dict]) -> None:
    """growth.png: each curve beside a line of exponent 1 through its largest size."""
    figure, plots = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for plot, curve in zip(plots.flat, curves, strict=True):
        sizes, seconds = curve["sizes"], curve["seconds"]
        plot.loglog(sizes, seconds, "o-", label="measured")
        plot.loglog(sizes, [seconds[-1] * size / sizes[-1] for size in sizes], ":", color="grey", label="in proportion")
        plot.set(xlabel=curve["label"], ylabel="seconds")
        plot.set_xticks(sizes, [f"{size:,}" for size in sizes])
        plot.set_xticks([], minor=True)
        plot.legend()
    figure.savefig(ROOT / "benchmarks" / "growth.png", dpi=110)


def main() -> None:
    """Rows of benchmarks that were not run again stay as they are."""
    place = ROOT / "benchmarks" / "RESULTS.md"
    old = place.read_text() if place.exists() else ""
    rows = {line.split(" | ")[0]: line for line in old.splitlines() if line.startswith("| ")}
    rows.pop(HEADER.split(" | ")[0], None)
    machines = set(old.partition("\nMachine: ")[2].rstrip(".\n").split("; ")) - {""}
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        if curves := [row["curve"] for row in record["rows"] if "curve" in row]:
            draw(curves)
        machines.add(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
        arguments = ", ".join(f"{key} {value}" for key, value in record["arguments"].items())
        for row in record["rows"]:
            known = ("work", "unit", "ours", "reference", "ratio", "curve")
            more = "; ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                             for key, value in row.items() if key not in known)
            reference, ratio = (f"{row['reference']:.3g}", f"**{row['ratio']:.1f}×**") if "ratio" in row else ("", "")
            line = (f"| {row['work']} | {row['ours']:.3g} | {reference} | {row['unit']} | {ratio} | "
                    f"{more}{'; ' if more else ''}{arguments} |")
            rows[line.split(" | ")[0]] = line
    table = "\n".join([HEADER, "|---|---|---|---|---|---|", *(rows[work] for work in sorted(rows))])
    place.write_text(f"{HEAD}{table}\n{GROWTH}\nMachine: {'; '.join(sorted(machines))}.\n")


if __name__ == "__main__":
    main()
