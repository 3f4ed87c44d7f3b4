"""Compare greedy replies of an exported GGUF file in llama.cpp's chat interface with our own, token by token.

    python export.py RUN FOLDER --gguf f32
    PYTHONPATH=. python benchmarks/llama_cpp_replies.py RUN FOLDER/FILE.gguf --dataset_path DATA.json

llama.cpp comes with the package xllamacpp (requirements/test.txt). Conversations are drawn from the validation split.
"""

import json
import random
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
import torch

from cli import command, positive_number, whole_number
from decoding import Decoding, fitted_context, generate_replies, load_checkpoint
from inputs import Specials, build_reply
from readers import read_any

TOKENS = 20


@contextmanager
def served(file: Path) -> Iterator[str]:
    """Run llama.cpp's server for a GGUF file in its own process, and yield its address."""
    with subprocess.Popen([sys.executable, Path(__file__).with_name("llama_server.py"), file], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            yield server.stdout.readline().strip()
        finally:
            server.kill()


def as_messages(persona: list[str], said: list[str]) -> list[dict]:
    """Convert a conversation to OpenAI's messages; the user says the last text of ``said``."""
    return [{"role": "system", "content": "\n".join(persona)}] * bool(persona) + [
        {"role": "user" if turns_back % 2 else "assistant", "content": text}
        for turns_back, text in zip(range(len(said), 0, -1), said, strict=True)]


def asked(address: str, path: str, **body) -> dict:
    response = requests.post(address + path, json=body, timeout=600)
    response.raise_for_status()
    return response.json()


def prompt_of(address: str, messages: list[dict]) -> list[int]:
    """Return the token ids into which the server renders a conversation."""
    prompt = asked(address, "/apply-template", messages=messages)["prompt"]
    return asked(address, "/tokenize", content=prompt, parse_special=True)["tokens"]


def reply_of(address: str, messages: list[dict]) -> list[int]:
    """Return the token ids of the server's greedy reply, without the token that ended it."""
    answer = asked(address, "/v1/chat/completions", messages=messages, temperature=0, max_tokens=TOKENS, logprobs=True)
    choice = answer["choices"][0]
    ids = [token["id"] for token in choice["logprobs"]["content"]]
    return ids if choice["finish_reason"] == "length" else ids[:-1]


@torch.inference_mode()
def margin(model, ids: list[int]) -> float:
    """Return the difference, in nats, between our two likeliest next tokens."""
    best = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(2).values
    return float(best[0] - best[1])


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("file", type=Path, metavar="FILE", help="the GGUF file that export.py made of the run")
    parser.add_argument("--dataset_path", type=Path, required=True, metavar="FILE")
    parser.add_argument("--conversations", type=positive_number, default=50, help="(default: %(default)s)")
    parser.add_argument("--seed", type=whole_number, default=42, help="seed of the draw (default: %(default)s)")
    args = parser.parse_args()
    model, tokenizer = load_checkpoint(args.run)
    special, greedy = Specials.of(tokenizer), Decoding(no_sample=True, max_length=TOKENS)
    turns = [(entry["personality"], turn["history"]) for entry in read_any(args.dataset_path)["valid"]
             for turn in entry["utterances"]]
    drawn = random.Random(args.seed).sample(turns, args.conversations)
    prompts = replies = 0
    with served(args.file) as address:
        for persona, said in drawn:
            said = said[-(2 * model.max_history + 1):]
            messages = as_messages(persona, said)
            context = fitted_context(model, tokenizer.encode_persona(persona), list(map(tokenizer.encode, said)),
                                     special, TOKENS)
            begun = context.ids + build_reply([], special, with_eos=False).ids
            ours, theirs = generate_replies(model, [context], special, greedy)[0], reply_of(address, messages)
            prompts += prompt_of(address, messages) == begun
            replies += ours == theirs
            if ours != theirs:
                same = next((at for at, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]),  # noqa: B905
                            min(len(ours), len(theirs)))
                print(json.dumps({"said": said[-1], "ours": tokenizer.decode(ours), "theirs": tokenizer.decode(theirs),
                                  "token": same, "our lead in nats": margin(model, begun + ours[:same])}))
    print(f"{args.file.name}: {prompts} of {len(drawn)} prompts and {replies} of {len(drawn)} replies are the same, "
          "token for token")


if __name__ == "__main__":
    command(main)
