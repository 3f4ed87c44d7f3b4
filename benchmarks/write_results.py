"""Write benchmarks/RESULTS.md and growth.png from what the benchmarks left in benchmarks/results."""

import json

from matplotlib import pyplot
from textbook import RESULTS, ROOT

HEAD = """# Benchmark results

`make bench` writes this file; do not edit it. Rows of benchmarks that were not run again stay as they are.

The table compares this project with the textbook path: transformers' own `OpenAIGPTDoubleHeadsModel`, used as the
2019 script used it. It computes in float32, pads every candidate as a full row to the longest of the data set,
computes all logits, and keeps no cache. Both sides have openai-gpt's size (117 M parameters, random weights) and
read real PERSONA-CHAT turns whose distractors were drawn again. Each benchmark first checks that both sides compute
the same. It then times them alternately and takes medians; for training it takes the mean over batches with the
typical lengths of an epoch.

In the rows "default bot against …" the other side is llama.cpp's server, or transformers' `generate()`, with the
weights of the default bot. The conversations are greedy; both servers keep what they computed in earlier turns. Ours
guesses tokens of a reply on its own (`drafts.py`), theirs does not by default. These rows were measured on a machine
whose large products run at 0.41 TFLOP/s in bfloat16. On the machine of the other rows, which is twice as fast, chat
was 1.16 times and 32 conversations were 1.55 times as fast as F16 in llama.cpp, and F1 was 3.6 times as fast as with
`generate()`.

In the rows "fine-tuning SmolLM2-135M" the other side is TRL's `SFTTrainer`, with the same weights, turns and precision.
After so few steps the perplexities differ because train.py has the optimizer of 2019, whose first steps are shorter;
the lab log has the perplexity with torch's. These rows are of wall time, with all threads.

"""

HEADER = "| work | this project | textbook | unit | ratio | more |"

GROWTH = """
## How time grows with size

![time against candidates, context length, batch size and turns](growth.png)

The attention of a packed row covers all its positions and masks what a candidate may not see. The time for
attention therefore grows with the square of the number of candidates and of the context length, and all other time
in proportion. Small sizes cost more than their share, because every weight is read whatever the size. A token table
grows more slowly than its turns, because strings repeat and each is tokenised once. Batches come out of it at the
same speed whatever its size.

## Where the time of a training step goes

Most of it goes into matrix products, which run near the highest speed that this machine reaches for them: see the
rows "where a training step goes" above. bfloat16 can be faster than float32 at most by the factor by which the
machine multiplies faster in it. Machines of the same name differ in this factor. The rows of CPUs, except those of the
default bot, come from one run of `make bench` (26 minutes; memory and the profile of a step were run again after it).
Its machine's large products run at 0.75 to 0.86 TFLOP/s in bfloat16 and about 0.45 in float32. It has no AMX.
"""

GPU = """
## On a GPU

`benchmarks/gpu.sh` measures this in eight minutes. Here its benchmark ran in two parts on one H200, with torch 2.11 of
that machine. Texts were split at spaces and punctuation there, because it has no spaCy. In training, "seconds to start"
are for compiling and recording CUDA graphs; the projected hours of the recipe include them. The compiled recipe found
the code of a run before in torch's cache; without it, the start took 18.9 s, and the projection was 0.0766 hours. The
peak was measured anew after each row, and was between 748 and 774 TFLOP/s on that day. The web server had held all
conversations three times before. docs/lab-log.md tells how a training step spends its time.

"""


def number(value: object) -> str:
    """Write a number with three digits, or any other value as it is."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def draw(curves: list[dict]) -> None:
    """Draw growth.png: each curve beside a line of exponent 1 through its largest size."""
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
    """Write RESULTS.md; rows of benchmarks that were not run again stay as they are."""
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
            more = "; ".join(f"{key} {number(value)}" for key, value in row.items() if key not in known)
            reference, ratio = (number(row["reference"]), f"**{row['ratio']:.1f}×**") if "ratio" in row else ("", "")
            line = (f"| {row['work']} | {number(row['ours'])} | {reference} | {row['unit']} | {ratio} | "
                    f"{more}{'; ' if more else ''}{arguments} |")
            rows[line.split(" | ")[0]] = line

    def table(on_gpu: bool) -> str:
        chosen = [rows[work] for work in sorted(rows) if work.endswith(" on cuda") == on_gpu]
        return "\n".join([HEADER, "|---|---|---|---|---|---|", *chosen])

    place.write_text(f"{HEAD}{table(False)}\n{GROWTH}{GPU}{table(True)}\n\n"
                     f"Machine: {'; '.join(sorted(machines))}.\n")


if __name__ == "__main__":
    main()
