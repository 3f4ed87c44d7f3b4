"""Provide the reference of all benchmarks: transformers' own double-heads model, used as in the scripts of 2019.

It computes in float32, with a full row per candidate, padded to the longest row of the data set, logits of the whole
vocabulary at every position, and no key-value cache. This file also has what the benchmarks share: real turns, models
of openai-gpt's size with the same random weights on both sides, and alternating timing.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import utils
from cli import positive_number, whole_number
from inputs import Specials, TurnDataset, build_input_from_segments
from model import PostNormDoubleHeadsModel
from tokenization import get_tokenizer
from weights import add_special_tokens_, load_model, save_model

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def parse_args(description: str, **defaults: int | str) -> argparse.Namespace:
    """Parse the flags that all benchmarks share; ``defaults`` are additional flags, or the default of ``repeats``."""
    parser = argparse.ArgumentParser(description=description)
    shared = ROOT.parent / "shared"  # real data if present, else the repository's own sample
    data = [shared / "data/personachat/personachat_self_original.json", ROOT / "data/sample_personachat.json"]
    tokenizers = [shared / "tokenizers/openai-gpt", ROOT / "models/tiny"]
    parser.add_argument("--data", default=next(str(path) for path in data if path.exists()),
                        help="corpus in the data format (default: %(default)s)")
    parser.add_argument("--tokenizer", default=next(str(path) for path in tokenizers if path.exists()),
                        help="folder with vocab.json and merges.txt (default: %(default)s)")
    parser.add_argument("--repeats", type=positive_number, default=defaults.pop("repeats", 3),
                        help="timings per side (default: %(default)s)")
    parser.add_argument("--seed", type=whole_number, default=42)
    for name, value in defaults.items():
        kind = str if isinstance(value, str) else positive_number if value else whole_number
        parser.add_argument(f"--{name}", type=kind, default=value)
    return parser.parse_args()


class Bench:
    """Hold both models, ``ours`` and ``own`` (transformers'), the tokenizer and the token table."""

    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(args.seed)
        with tempfile.TemporaryDirectory() as folder:
            for name in ("vocab.json", "merges.txt"):
                (Path(folder) / name).symlink_to(Path(args.tokenizer, name).resolve())
            words = json.loads(Path(folder, "vocab.json").read_text("utf-8"))
            transformers.OpenAIGPTConfig(vocab_size=len(words)).save_pretrained(folder)  # otherwise openai-gpt's shape
            self.tokenizer = get_tokenizer(folder)
            self.ours: PostNormDoubleHeadsModel = load_model(folder)
            add_special_tokens_(self.ours, self.tokenizer)
            save_model(self.ours, folder)
            self.own = transformers.OpenAIGPTDoubleHeadsModel.from_pretrained(folder)
        self.special = Specials.of(self.tokenizer)
        cache = Path(tempfile.gettempdir(), f"transfertransfo_bench_{os.getuid()}")
        self.table = utils.get_dataset(self.tokenizer, args.data, str(cache))

    def dataset(self, split: str, candidates: int) -> TurnDataset:
        return TurnDataset(self.table[split], self.tokenizer, 512, num_candidates=candidates)

    def longest(self, dataset: TurnDataset) -> int:
        """Return the length of the longest row that the 2019 script would build: context and longest candidate."""
        split, sizes, longest = dataset.split, self.table.array("token_offsets"), 0
        sizes = sizes[1:] - sizes[:-1]
        for turn in range(split.num_turns):
            context = 1 + sizes[split.strings("persona", split.turn_dialog[turn])].sum()
            context += (1 + sizes[split.strings("history", turn)[-dataset.num_utterances:]]).sum()
            reply = sizes[split.strings("candidates", turn)[-dataset.num_candidates:]].max() + 2
            longest = max(longest, int(context + reply))
        return longest

    def padded(self, dataset: TurnDataset, turns: list[int], width: int) -> dict[str, torch.Tensor]:
        """Build a batch as in 2019: (turns, candidates, width) tensors."""
        rows = []
        for turn in turns:
            persona, history = dataset.context(turn)
            replies = dataset.split.token_ids("candidates", turn)[-dataset.num_candidates:]
            rows.append([
                build_input_from_segments(persona, history, reply, self.tokenizer, lm_labels=n == len(replies) - 1)
                for n, reply in enumerate(replies)])

        def tensor(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([[row[name] + [fill] * (width - len(row[name])) for row in turn] for turn in rows])

        return {
            "input_ids": tensor("input_ids", self.special.pad),
            "token_type_ids": tensor("token_type_ids", self.special.pad),
            "labels": tensor("lm_labels", -100),
            "mc_token_ids": torch.tensor([[row["mc_token_ids"] for row in turn] for turn in rows]),
            "mc_labels": torch.tensor([len(turn) - 1 for turn in rows]),
        }


def alternate(sides: dict[str, Callable[[], None]], repeats: int,
              average: Callable[[list[float]], float] = statistics.median) -> dict[str, float]:
    """Return the average seconds of each side; the sides alternate, so that a slow minute affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            gc.collect()
            start = time.perf_counter()
            side()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: average(values) for name, values in times.items()}


def close(ours: float, reference: float, tolerance: float, what: str) -> None:
    """Exit if both sides do not compute the same; call this before timing them."""
    if abs(ours - reference) > tolerance:
        raise SystemExit(f"{what} differs: ours {ours}, reference {reference}; nothing was timed")


def report(name: str, args: argparse.Namespace, rows: list[dict]) -> None:
    """Print the rows of a benchmark, and save them with machine and versions for RESULTS.md."""
    RESULTS.mkdir(exist_ok=True)
    record = {
        "arguments": {key: Path(value).name if key in ("data", "tokenizer") else value
                      for key, value in vars(args).items() if value},
        "machine": machine(), "rows": rows,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    for row in rows:
        print(", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in row.items()))


def machine() -> dict[str, str]:
    """Describe the machine and the versions of the libraries."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    return {"cpu": f"{cpu}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
