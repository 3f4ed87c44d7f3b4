"""Measure tokenising and caching of a file of full size: 131,438 + 7,801 turns with 20 candidates.

The file repeats the dialogs of the real text, each time with the last words of all strings rotated and with new
distractors, so that it has about as many distinct strings as the published file (130 thousand). The reference tokenises
every occurrence of a string, as in 2019; it is timed on a part of the file and scaled up.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from textbook import Bench, parse_args, report

FULL = {"train": 131_438, "valid": 7_801}
# Builds or reads the table in its own process, and prints the seconds and the peak memory.
CHILD = """
import resource, sys, time
from tokenization import get_tokenizer
import utils
tokenizer = get_tokenizer(sys.argv[1])
start = time.perf_counter()
utils.get_dataset(tokenizer, sys.argv[2], sys.argv[3])
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def variant(sentences: list[str], copy: int) -> dict[str, str]:
    """Replace a sentence's last word by that of the sentence 1000 · ``copy`` places later; copy 0 changes nothing."""
    if not copy:
        return {sentence: sentence for sentence in sentences}
    words = [sentence.rsplit(" ", 1) for sentence in sentences]
    return {sentence: " ".join([*words[n][:-1], words[(n + 1000 * copy) % len(words)][-1]])
            for n, sentence in enumerate(sentences)}


def full_size(corpus: dict, seed: int) -> dict:
    """Make the data that the module's docstring describes."""
    rng, full = random.Random(seed), {}
    for split, entries in corpus.items():
        sentences = list(dict.fromkeys(
            text for entry in entries for turn in entry["utterances"]
            for text in [*entry["personality"], *turn["history"], *turn["candidates"]]))
        full[split], turns, copy = [], 0, 0
        while turns < FULL[split]:
            changed = variant(sentences, copy % 3)  # makes two and a half times as many strings
            pool = list(changed.values())
            for entry in entries:
                kept = entry["utterances"][:FULL[split] - turns]
                turns += len(kept)
                if kept:
                    full[split].append({
                        "personality": [changed[text] for text in entry["personality"]],
                        "utterances": [{"history": [changed[text] for text in turn["history"]],
                                        "candidates": [*rng.choices(pool, k=19), changed[turn["candidates"][-1]]]}
                                       for turn in kept]})
            copy += 1
    return full


def main() -> None:
    args = parse_args(__doc__.splitlines()[0], sample=40)
    bench = Bench(args)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, data = Path(folder, "gpt"), Path(folder, "full.json")
        bench.tokenizer.save_pretrained(checkpoint)
        bench.ours.config.save_pretrained(checkpoint)
        corpus = full_size(json.loads(Path(args.data).read_text()), args.seed)
        data.write_text(json.dumps(corpus))

        def build() -> tuple[float, float]:
            done = subprocess.run([sys.executable, "-c", CHILD, checkpoint, data, Path(folder, "cache")], check=True,
                                  capture_output=True, text=True, env={"PYTHONPATH": str(Path(__file__).parents[1])})
            seconds, kilobytes = map(float, done.stdout.split())
            return seconds, kilobytes / 2**20

        cold, memory = build()
        warm, _ = build()

        # The reference tokenises every occurrence of a string, on whole dialogs spread over the file.
        entries, turns, start = corpus["train"][::len(corpus["train"]) // args.sample], 0, time.perf_counter()
        for entry in entries:
            for text in entry["personality"]:
                bench.tokenizer.convert_tokens_to_ids(bench.tokenizer.tokenize(text))
            for turn in entry["utterances"]:
                turns += 1
                for text in turn["history"] + turn["candidates"]:
                    bench.tokenizer.convert_tokens_to_ids(bench.tokenizer.tokenize(text))
        reference = (time.perf_counter() - start) / turns * sum(FULL.values())
    report("tokenising", args, [{
        "work": "tokenise and cache a full-size file", "unit": "s", "ours": cold, "reference": reference,
        "ratio": reference / cold, "warm start, s": warm, "peak memory, GiB": memory,
        "reference measured on turns": turns,
        "distinct strings": len({text for split in corpus.values() for entry in split for turn in entry["utterances"]
                                 for text in turn["candidates"]})}])


if __name__ == "__main__":
    main()
