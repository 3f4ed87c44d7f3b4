"""Measure the web server over HTTP with replies of 20 tokens: many conversations at once, and one at a time.

Each conversation takes its persona, marked with a number, and the user's lines from a dialog of the data; the model's
own replies become part of the history. Before anything is reported, the replies of conversations that ran alone are
compared with their replies among all others; in half precision, near ties may differ.
"""

import asyncio
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager

import httpx
import numpy as np
from textbook import ROOT, Bench, parse_args, report

from tables import Split
from weights import save_model

LENGTH = 20


@contextmanager
def server(folder: str, precision: str, device: str = "cpu"):
    """Run `demo.py` with a checkpoint, and yield its address."""
    flags = ["--model_checkpoint", folder, "--dataset_path", str(ROOT / "data" / "sample_personachat.json"),
             "--port", "0", "--device", device, "--min_length", str(LENGTH),
             "--fp16", "bf16" if precision == "bfloat16" else ""]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, ROOT / "demo.py", *flags], cwd=folder, stdout=log, stderr=log,
                                   env={**os.environ, "PYTHONUNBUFFERED": "1"})
        try:
            while not (found := re.search(r"Open (http://\S+) in", (log.seek(0), log.read())[1])):
                if process.poll() is not None:
                    raise SystemExit(log.read())
                time.sleep(0.2)
            yield found[1]
        finally:
            process.terminate()
            process.wait()


async def converse(client: httpx.AsyncClient, number: int, persona: list[str], lines: list[str], waits: list[float]
                   ) -> list[str]:
    """Hold a conversation, return the replies, and append the seconds of each reply to ``waits``."""
    mark = f"my number is {number} ."
    messages = [{"role": "system", "content": "\n".join([*persona, mark])}]
    for line in lines:
        messages.append({"role": "user", "content": line})
        start = time.perf_counter()
        reply = await client.post("/v1/chat/completions", json={
            "messages": messages, "max_tokens": LENGTH, "seed": number + 1, "top_k": 5})
        waits.append(time.perf_counter() - start)
        reply.raise_for_status()
        assert reply.json()["usage"]["completion_tokens"] == LENGTH
        messages.append(reply.json()["choices"][0]["message"])
    return [message["content"] for message in messages[2::2]]


async def measure(address: str, dialogs: list[tuple[list[str], list[str]]], alone: int, crowds: int = 0
                  ) -> dict[str, float]:
    """Time the conversations, the first ``alone`` of them also one at a time.

    ``crowds``: how often all are held before as a warm-up. A GPU records a pass of each shape when it comes again.
    """
    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        async def crowd_of(waits: list[float]) -> list[list[str]]:
            return await asyncio.gather(*(converse(client, number, *dialog, waits)
                                          for number, dialog in enumerate(dialogs)))

        await converse(client, 0, *dialogs[0], [])  # warm-up
        for _ in range(crowds):
            await crowd_of([])
        single, start = [], time.perf_counter()
        waits_alone: list[float] = []
        for number, dialog in enumerate(dialogs[:alone]):
            single.append(await converse(client, number, *dialog, waits_alone))
        seconds_alone = time.perf_counter() - start
        waits: list[float] = []
        start = time.perf_counter()
        crowd = await crowd_of(waits)
        seconds = time.perf_counter() - start
    for number, (first, *_) in enumerate(single):  # compare first replies; a near tie may change later ones
        likest = max(range(len(crowd)), key=lambda other: len(os.path.commonprefix([first, crowd[other][0]])))
        if likest != number:
            raise SystemExit(f"conversation {number} got the reply {crowd[number][0]!r}, but alone {first!r}")
    equal = sum(mine == same for replies, others in zip(single, crowd, strict=False)
                for mine, same in zip(replies, others, strict=True))
    return {"ours": sum(map(len, crowd)) / seconds, "reference": sum(map(len, single)) / seconds_alone,
            "reply after, s, median": statistics.median(waits), "longest": max(waits),
            "one at a time": statistics.median(waits_alone), "equal to alone, %": 100 * equal / sum(map(len, single))}


def conversations(split: Split, count: int, turns: int) -> list[tuple[list[str], list[str]]]:
    """Return persona and user's lines of ``count`` conversations of ``turns`` turns; dialogs repeat if they are few."""
    long_enough = np.flatnonzero(np.bincount(split.turn_dialog) >= turns)
    found = []
    for dialog in np.resize(long_enough, count).tolist():
        first = int(np.searchsorted(split.turn_dialog, dialog))
        lines = [split.texts("history", turn)[-1] for turn in range(first, first + turns)]
        found.append((split.texts("persona", dialog), lines))
    return found


def main() -> None:
    args = parse_args(__doc__.splitlines()[0], conversations=32, turns=5, alone=8)
    bench = Bench(args)
    dialogs, rows = conversations(bench.table["valid"], args.conversations, args.turns), []
    with tempfile.TemporaryDirectory() as folder:
        bench.tokenizer.save_pretrained(folder)
        save_model(bench.ours, folder)
        del bench
        for precision in ("bfloat16", "float32"):
            with server(folder, precision) as address:
                figures = asyncio.run(measure(address, dialogs, args.alone))
            rows.append({"work": f"web server, {len(dialogs)} conversations at once against one at a time, {precision}",
                         "unit": "replies/s", "ratio": figures["ours"] / figures["reference"], **figures})
    report("serving", args, rows)


if __name__ == "__main__":
    main()
