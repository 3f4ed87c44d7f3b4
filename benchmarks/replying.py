"""Measure decoding of 20 tokens, for one chat reply and for a batch as in F1, with our code and the textbook path."""

import copy
import itertools

import torch
from textbook import Bench, alternate, parse_args, report

from decoding import Decoding, generate_replies, top_filtering
from inputs import build_context, build_reply
from packing import prepare_to_decode_

LENGTH = 20


@torch.inference_mode()
def main() -> None:
    args = parse_args(__doc__, turns=32, samples=8)
    bench = Bench(args)
    bench.ours.eval(), bench.own.eval()
    dataset = bench.dataset("valid", 1)
    sampling = Decoding(max_length=LENGTH, min_length=LENGTH)
    greedy = sampling.over(no_sample=True)

    def reference(turn: int, decoding: Decoding) -> list[int]:
        """Decode as in 2019: compute the whole sequence again for each token."""
        context, reply = build_context(*dataset.context(turn), bench.special), []
        for _ in range(LENGTH):
            begun = build_reply(reply, bench.special, with_eos=False)
            logits = bench.own(torch.tensor([context.ids + begun.ids]),
                               token_type_ids=torch.tensor([context.types + begun.types])).logits[0, -1]
            logits[list(bench.special)] = -torch.inf
            if decoding.no_sample:
                reply.append(int(logits.argmax()))
            else:
                logits = top_filtering(logits / decoding.temperature, top_p=decoding.top_p)
                reply.append(int(torch.multinomial(logits.softmax(-1), 1)))
        return reply

    def ours(turns: list[int], decoding: Decoding, model=bench.ours, samples: int = 1) -> list[list[int]]:
        contexts = [build_context(*dataset.context(turn), bench.special) for turn in turns]
        return generate_replies(model, contexts, bench.special, decoding, samples=samples)

    with torch.inference_mode(False):  # as in the scripts: weights made in inference mode are slower
        half = prepare_to_decode_(copy.deepcopy(bench.ours), "cpu", "bf16")
    checked = [7, len(dataset) // 3, len(dataset) // 2]
    if ours(checked, greedy) != [reference(turn, greedy) for turn in checked]:
        raise SystemExit("greedy replies differ; nothing was timed")

    turns = itertools.cycle(torch.randperm(len(dataset)).tolist())

    def take(count: int) -> list[int]:
        return list(itertools.islice(turns, count))

    seconds = alternate({
        "chat float32": lambda: ours(take(1), sampling), "chat bfloat16": lambda: ours(take(1), sampling, half),
        "batch float32": lambda: ours(take(args.turns), sampling),
        "batch bfloat16": lambda: ours(take(args.turns), sampling, half),
        "samples float32": lambda: ours(take(1), sampling, samples=args.samples),
        "samples bfloat16": lambda: ours(take(1), sampling, half, samples=args.samples),
        "reference": lambda: reference(take(1)[0], sampling),
    }, args.repeats)
    rows = []
    works = (("chat", 1, "chat, one reply of 20 tokens"), ("batch", args.turns, "F1, sampling 20 tokens, batched"),
             ("samples", args.samples, f"{args.samples} samples of 20 tokens of one context"))
    for name, count, work in works:
        for precision in ("float32", "bfloat16"):
            each = seconds[f"{name} {precision}"] / count
            rows.append({"work": f"{work}, {precision}", "unit": "replies/s", "ours": 1 / each,
                         "reference": 1 / seconds["reference"], "ratio": seconds["reference"] / each})
    report("replying", args, rows)


if __name__ == "__main__":
    main()
