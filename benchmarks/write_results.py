"""Write benchmarks/RESULTS.md from what the benchmarks left in benchmarks/results."""

import json

from textbook import RESULTS, ROOT

HEAD = """# Benchmark results

Written by `make bench`; do not edit. Ours against the textbook path: transformers' own `OpenAIGPTDoubleHeadsModel` used
the 2019 way (float32, every candidate a full row padded to the data set's longest, all logits, no cache), openai-gpt's
size (117 M parameters, random weights), real PERSONA-CHAT turns with redrawn distractors. Each benchmark checks that
both sides compute the same before it times them, alternates them, and takes medians.

"""

GROWTH = """
## Growth

![time against candidates, context length, batch size and turns](growth.png)

A packed row's attention is over all its positions, and masks what a candidate may not see: its share grows with the
square of candidates and of context length, while everything else grows in proportion. Small sizes cost more than their
share because every weight is read whatever the size.
"""


def main() -> None:
    text, machines = HEAD, set()
    text += "| work | ours | textbook | unit | ratio | more |\n|---|---|---|---|---|---|\n"
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        machines.add(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
        for row in record["rows"]:
            known = ("work", "unit", "ours", "reference", "ratio")
            more = "; ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value:,}"
                             for key, value in row.items() if key not in known)
            arguments = ", ".join(f"{key} {value}" for key, value in record["arguments"].items())
            reference, ratio = (f"{row['reference']:.3g}", f"**{row['ratio']:.1f}×**") if "ratio" in row else ("", "")
            text += (f"| {row['work']} | {row['ours']:.3g} | {reference} | {row['unit']} | {ratio} | "
                     f"{more}{'; ' if more else ''}{arguments} |\n")
    text += GROWTH
    text += "\nMachine: " + "; ".join(sorted(machines)) + ".\n"
    (ROOT / "benchmarks" / "RESULTS.md").write_text(text)


if __name__ == "__main__":
    main()
