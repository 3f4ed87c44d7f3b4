"""Measure memory and time to build the token table and to train from it, with few turns and with a million.

    PYTHONPATH=. python benchmarks/data_growth.py --data_dir FOLDER --model_checkpoint TOKENIZER_AND_CONFIG

FOLDER holds DailyDialog's release. Data of each size consist of its dialogs, drawn with replacement; a fifth of the
utterances get another utterance appended, so that new text keeps coming. Each size runs in its own processes.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import utils
from cli import positive_number, whole_number
from inputs import TurnDataset, get_loader
from tokenization import get_tokenizer
from weights import add_special_tokens_, load_model


def write_release(folder: Path, source: Path, turns: int, seed: int) -> None:
    """Write about ``turns`` training turns and one validation dialog in DailyDialog's layout."""
    dialogs = [line.split("__eou__")[:-1] for line in source.read_text("utf-8").splitlines()]
    sentences = [text for dialog in dialogs for text in dialog]
    rng, written = random.Random(seed), 0
    folder.mkdir(parents=True)
    with open(folder / "dialogues_train.txt", "w", encoding="utf-8") as file:
        while written < turns:
            dialog = rng.choice(dialogs)
            more = [f" {rng.choice(sentences)}" if rng.random() < 0.2 else "" for _ in dialog]
            file.write("".join(f"{text}{other} __eou__" for text, other in zip(dialog, more, strict=True)) + "\n")
            written += len(dialog) - 1
    (folder / "dialogues_validation.txt").write_text("Hello . __eou__ Hello . __eou__\n")


def memory(field: str) -> float:
    """Return the memory of this process in MiB: ``Rss`` includes the mapped file's pages, ``Anonymous`` does not."""
    lines = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(lines[field].split()[0]) / 1024


def run(folder: str, checkpoint: str, batches: int) -> dict:
    """Measure the build or the training of one size."""
    tokenizer = get_tokenizer(checkpoint)
    if "build" in sys.argv:
        before, start = memory("Rss"), time.perf_counter()
        utils.get_dataset(tokenizer, "", f"{folder}/cache", "dailydialog", folder)
        peak = int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines()
                        if line.startswith("VmHWM"))) / 1024
        return {"build, s": time.perf_counter() - start, "build, MiB added at the peak": peak - before}
    model = load_model(checkpoint)
    add_special_tokens_(model, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    start, before = time.perf_counter(), memory("Anonymous")
    split = utils.get_dataset(tokenizer, "", f"{folder}/cache", "dailydialog", folder)["train"]
    dataset = TurnDataset(split, tokenizer, 512, num_candidates=1)
    loader = get_loader(dataset, dataset.lengths()[0], 16, seed=1)
    ready = iter(loader)
    figures = {"turns": split.num_turns, "strings": len(split.table.array("token_offsets")) - 1,
               "table, MiB": os.path.getsize(next(Path(folder).glob("cache*.safetensors"))) / 2 ** 20}
    next(ready)
    figures["first batch, s"] = time.perf_counter() - start
    took, stepped = [], []  # CPU time, which other processes disturb less
    for _ in range(batches // 50):
        start = time.process_time()
        for _ in range(50):
            next(ready)
        took.append((time.process_time() - start) / 50)
    for _, batch in zip(range(batches // 4), ready, strict=False):
        start = time.process_time()
        model(**batch).lm_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        stepped.append((time.process_time() - start) / int((batch["segment_ids"] >= 0).sum()))
    return figures | {"a batch of 16, ms of CPU": 1e3 * statistics.median(took),
                      "training, µs of CPU per token": 1e6 * statistics.median(stepped),
                      "private memory added, MiB": memory("Anonymous") - before, "Rss, MiB": memory("Rss")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--model_checkpoint", required=True)
    parser.add_argument("--turns", type=positive_number, nargs="+", default=[20_000, 1_000_000])
    parser.add_argument("--batches", type=positive_number, default=1000)
    parser.add_argument("--seed", type=whole_number, default=42)
    parser.add_argument("--of", help=argparse.SUPPRESS)  # internal: the folder of one size, measured in its own process
    args, _ = parser.parse_known_args()
    if args.of:
        print(json.dumps(run(args.of, args.model_checkpoint, args.batches)))
        return
    source = next(Path(args.data_dir).rglob("dialogues_train.txt"))
    for turns in args.turns:
        with tempfile.TemporaryDirectory() as folder:
            write_release(Path(folder, "dailydialog"), source, turns, args.seed)
            figures = {}
            for phase in ("build", "train"):
                done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--of", folder, phase], check=True,
                                      stdout=subprocess.PIPE, text=True)
                figures |= json.loads(done.stdout.splitlines()[-1])
            print(", ".join(f"{name} {value:,.2f}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
