"""Measure the default bot beside llama.cpp, and its evaluation beside transformers' `generate()`, on the same weights.

Both servers get the same conversations over HTTP: one at a time, and many at once. In each turn the model writes 20
tokens greedily, and its reply becomes part of the history, so both can use what they computed in earlier turns. All
sides use as many threads as OMP_NUM_THREADS says, or as there are cores.
"""

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import httpx
import torch
import transformers
from llama_cpp_replies import as_messages, prompt_of
from serving import server as our_server
from textbook import ROOT, alternate, parse_args, report

from decoding import Decoding, fitted_context, generate_replies, load_checkpoint
from inputs import Specials, begin_reply
from model import DoubleHeadsModel
from readers import read_any
from sequences import Sequences
from weights import linear_layers

LENGTH = 20
numbers = itertools.count(1)


@contextlib.contextmanager
def llama_server(file: Path, slots: int, threads: int):
    """Run llama.cpp's server in its own process, and yield its address."""
    with subprocess.Popen([sys.executable, Path(__file__).with_name("llama_server.py"), file, str(slots), str(threads)],
                          text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


async def converse(client: httpx.AsyncClient, dialog: tuple[list[str], list[str]], extra: dict) -> list[str]:
    """Hold a conversation and return the replies."""
    persona, lines = dialog
    mark = f"my number is {next(numbers):06} ."  # new each time: nothing of an earlier run is known
    messages = [{"role": "system", "content": "\n".join([mark, *persona])}]
    for line in lines:
        messages.append({"role": "user", "content": line})
        reply = await client.post("/v1/chat/completions", headers={"Authorization": mark},
                                  json={"messages": messages, "max_tokens": LENGTH, "temperature": 0} | extra)
        reply.raise_for_status()
        assert reply.json()["usage"]["completion_tokens"] == LENGTH
        messages.append({"role": "assistant", "content": reply.json()["choices"][0]["message"]["content"]})
    return [message["content"] for message in messages[2::2]]


def hold(address: str, dialogs: list, extra: dict, at_once: bool) -> list[list[str]]:
    """Hold conversations, all at once or one after the other."""
    async def run() -> list[list[str]]:
        async with httpx.AsyncClient(base_url=address, timeout=600) as client:
            if at_once:
                return await asyncio.gather(*(converse(client, dialog, extra) for dialog in dialogs))
            return [await converse(client, dialog, extra) for dialog in dialogs]

    return asyncio.run(run())


def peaks() -> dict[str, float]:
    """Measure what the machine can do at best, with the threads that are used."""
    one, vector = torch.randn(2048, 2048).bfloat16(), torch.randn(1 << 27)
    seconds = alternate({"multiply": lambda: one @ one, "read": lambda: vector.sum()}, 3, min)
    return {"peak, TFLOP/s": 2 * 2048 ** 3 / seconds["multiply"] / 1e12,
            "reading memory, GB/s": 4 * (1 << 27) / seconds["read"] / 1e9}


def beside_llama_cpp(args, folder: Path, dialogs: list, threads: int) -> list[dict]:
    """Measure conversations on both servers, which must read the same tokens.

    bfloat16, F16 and Q8_0 decide near ties differently; `llama_cpp_replies.py` compares replies in float32. Q8_0 has
    half of the bytes of the other two.
    """
    model, tokenizer = load_checkpoint("persona")
    special = Specials.of(tokenizer)
    subprocess.run([sys.executable, ROOT / "export.py", "persona", folder, "--gguf", "f16", "q8_0"],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    theirs = {"ignore_eos": True}

    def measured(kind: str, slots: int, chosen: list, work: str) -> dict:
        file = next(folder.glob(f"*-{kind}.gguf"))
        with our_server(str(ROOT / "models" / "persona"), "bfloat16") as ours, \
                llama_server(file, slots, threads) as other:
            for persona, lines in dialogs[:args.alone]:
                context = fitted_context(model, tokenizer.encode_persona(persona), [tokenizer.encode(lines[0])],
                                         special, LENGTH)
                if prompt_of(other, as_messages(persona, lines[:1])) != begin_reply(context, special, []).ids:
                    raise SystemExit(f"llama.cpp reads other tokens for {persona}, {lines[0]!r}; nothing was timed")
            first = [[replies[0] for replies in hold(address, [(persona, lines[:1]) for persona, lines in dialogs],
                                                     extra, True)]
                     for address, extra in ((ours, {}), (other, theirs))]
            seconds = alternate({"ours": lambda: hold(ours, chosen, {}, slots > 1),
                                 "theirs": lambda: hold(other, chosen, theirs, slots > 1)}, args.repeats)
        count = len(chosen) * args.turns
        return {"work": f"default bot against llama.cpp ({kind.upper()}): {work}, bfloat16, {threads} thread(s)",
                "unit": "replies/s", "ours": count / seconds["ours"], "reference": count / seconds["theirs"],
                "ratio": seconds["theirs"] / seconds["ours"],
                "first replies that are the same, %": 100 * sum(map(str.__eq__, *first)) / len(dialogs)}

    return [measured(kind, *how) for kind in ("f16", "q8_0") for how in (
        (1, dialogs[:args.alone], "chat, one conversation at a time"),
        (args.conversations, dialogs, f"{args.conversations} conversations at once"))]


def operations(model: DoubleHeadsModel, weights: int, work: Callable[[], object]) -> float:
    """Count the operations of ``work()`` in products with the weights: 2 per weight and token or logits' row."""
    done, states, logits = [0], Sequences._states, model.vocabulary_logits
    head = model.get_input_embeddings().weight.numel()

    def count_states(self, ids, *rest):
        done[0] += 2 * weights * ids.numel()
        return states(self, ids, *rest)

    def count_logits(hidden):
        done[0] += 2 * head * hidden[..., 0].numel()
        return logits(hidden)

    with mock.patch.object(Sequences, "_states", count_states), \
            mock.patch.object(model, "vocabulary_logits", count_logits):
        work()
    return done[0]


def beside_generate(args, folder: Path, turns: list[tuple[list[str], list[str]]], threads: int) -> dict:
    """Measure greedy replies in batches, as evaluation of F1 decodes them; in float32 both sides must agree."""
    own = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model, tokenizer = load_checkpoint("persona")
    special, greedy = Specials.of(tokenizer), Decoding(no_sample=True, max_length=LENGTH)
    contexts = [fitted_context(model, tokenizer.encode_persona(persona), [tokenizer.encode(text) for text in said],
                               special, LENGTH) for persona, said in turns]
    batches = [contexts[start:start + 32] for start in range(0, len(contexts), 32)]

    @torch.inference_mode()
    def textbook(batch: list) -> list[list[int]]:
        prompts = [begin_reply(context, special, []).ids for context in batch]
        width = max(map(len, prompts))
        ids = torch.tensor([[special.pad] * (width - len(prompt)) + prompt for prompt in prompts])
        seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = own.generate(ids, attention_mask=seen, do_sample=False, max_new_tokens=LENGTH, min_new_tokens=1,
                           eos_token_id=list(special), pad_token_id=special.pad)[:, width:].tolist()
        return [list(itertools.takewhile(lambda token: token not in special, reply)) for reply in out]

    if generate_replies(model, batches[0], special, greedy) != textbook(batches[0]):
        raise SystemExit("greedy replies in float32 differ; nothing was timed")
    weights = sum(layer.weight.numel() for layer in linear_layers(model))
    model, tokenizer = load_checkpoint("persona", fp16="bf16")
    own.bfloat16()
    seconds = alternate({"ours": lambda: [generate_replies(model, batch, special, greedy) for batch in batches],
                         "theirs": lambda: [textbook(batch) for batch in batches]}, args.repeats)
    same = sum(mine == yours for batch in batches for mine, yours in zip(
        generate_replies(model, batch, special, greedy), textbook(batch), strict=True))
    return {"work": f"default bot against transformers' generate(): F1, batches of 32, bfloat16, {threads} thread(s)",
            "unit": "replies/s", "ours": len(contexts) / seconds["ours"],
            "reference": len(contexts) / seconds["theirs"], "ratio": seconds["theirs"] / seconds["ours"],
            "replies that are the same, %": 100 * same / len(contexts),
            "GFLOP per reply": operations(model, weights, lambda: [
                generate_replies(model, batch, special, greedy) for batch in batches]) / len(contexts) / 1e9}


def main() -> None:
    args = parse_args(__doc__.splitlines()[0], conversations=32, turns=5, alone=4, batches=2)
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    entries = list(read_any(Path(args.data))["valid"])
    long = [entry for entry in entries if len(entry["utterances"]) >= args.turns]
    dialogs = [(entry["personality"], [turn["history"][-1] for turn in entry["utterances"][:args.turns]])
               for entry in itertools.islice(itertools.cycle(long), args.conversations)]
    turns = [(entry["personality"], turn["history"]) for entry in entries for turn in entry["utterances"]]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        rows = beside_llama_cpp(args, Path(name), dialogs, threads)
        rows.append(beside_generate(args, Path(name), turns[:32 * args.batches], threads))
    peak = peaks()
    rows[-1]["replies/s at the peak"] = 1e3 * peak["peak, TFLOP/s"] / rows[-1]["GFLOP per reply"]
    report("llama_cpp", args, [row | peak for row in rows])
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
