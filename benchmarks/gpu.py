"""Measure training, choosing, decoding and the web server on a GPU, in at most eight minutes.

    benchmarks/gpu.sh                                 # all of it, with RESULTS.md
    benchmarks/gpu.sh --parts decoding,serving        # some of it
    benchmarks/gpu.sh --device cpu --model models/tiny --turns 4 --warm_up 1 --repeats 1     # on a CPU, to see it work

A part that fails prints why and the others go on; after every part the results so far are saved. The sides are
openai-gpt's size with random weights, for the recipe of 2019, and ``--model``, by default SmolLM2-135M. Most shapes of
batches must have come twice before training has its later speed, so that the warm-up has hundreds of batches.
"""

import asyncio
import itertools
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from full_recipe import measure, synchronize
from serving import conversations, server
from serving import measure as converse
from textbook import Bench, parse_args, report

import utils
from decoding import Decoding, Memory, generate_replies
from inputs import DialogDataset, Specials, TurnDataset, build_context, get_loader
from model import DoubleHeadsModel, autocast
from packing import prepare_to_decode_
from tokenization import get_tokenizer, save_tokenizer
from weights import add_special_tokens_, load_model, save_model

LENGTH = 20  # tokens of a reply
TIMES = 5  # for the mean of other work than training
PARTS = "recipe,fine_tuning,choosing,decoding,serving"  # methods of `Parts`


class Parts:
    """The parts of the measurement; each yields rows of results."""

    def __init__(self, args: Namespace):
        self.args, self.tokenizer = args, get_tokenizer(args.model)
        self.special = Specials.of(self.tokenizer)
        self.compiled = (False,) if args.device == "cpu" else (False, True)
        cache = Path(tempfile.gettempdir(), "transfertransfo_gpu")
        self.table = utils.get_dataset(self.tokenizer, args.data, str(cache))

    def model(self) -> DoubleHeadsModel:
        model = load_model(self.args.model)
        add_special_tokens_(model, self.tokenizer)
        return model.to(self.args.device)

    def dataset(self, split: str, candidates: int, kind: type[TurnDataset] = TurnDataset, max_history: int = 2
                ) -> TurnDataset:
        model = self.model()
        model.config.max_history = max_history
        return kind.for_model(model, self.table[split], self.tokenizer, num_candidates=candidates)

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the mean seconds of ``work()`` after a warm-up."""
        work()
        synchronize(self.args.device)
        start = time.perf_counter()
        for _ in range(TIMES):
            work()
        synchronize(self.args.device)
        return (time.perf_counter() - start) / TIMES

    def recipe(self) -> Iterator[dict]:
        for compiled in self.compiled:
            bench = Bench(self.args)
            yield {"work": f"full recipe, openai-gpt's size, 4 candidates{', compiled' * compiled}", "unit": "turns/s",
                   **measure(bench.ours, bench.dataset("train", 4), self.args, compiled)}

    def fine_tuning(self) -> Iterator[dict]:
        name = Path(self.args.model).name
        ways = (("a row per turn", TurnDataset, self.args.turns, 2),
                ("whole histories, --pack_dialogs", DialogDataset, max(1, self.args.turns // 8), 20))
        for (label, kind, turns, max_history), compiled in itertools.product(ways, self.compiled):
            args = Namespace(**vars(self.args) | {"turns": turns})
            figures = measure(self.model(), self.dataset("train", 4, kind, max_history), args, compiled)
            del figures["hours for 3 epochs of 2 permutations"]
            yield {"work": f"training {name}, 4 candidates, {label}{', compiled' * compiled}", "unit": "turns/s",
                   **figures}

    @torch.inference_mode()
    def choosing(self) -> Iterator[dict]:
        model, dataset = self.model(), self.dataset("valid", 20)
        loader = get_loader(dataset, dataset.lengths()[0], self.args.turns, pin_memory=self.args.device != "cpu")
        batch = {name: tensor.to(self.args.device) for name, tensor in next(itertools.islice(loader, 1, None)).items()}

        def score() -> None:
            with autocast(self.args.device, "bf16"):
                model(**batch)

        yield {"work": "hits@1, 20 candidates", "unit": "turns/s", "ours": self.args.turns / self.seconds(score)}

    def decoding(self) -> Iterator[dict]:
        model, dataset = prepare_to_decode_(self.model(), self.args.device, "bf16"), self.dataset("valid", 1)
        contexts = [build_context(*dataset.context(turn), self.special) for turn in range(64)]
        for count, sampled in itertools.product((1, 64), (False, True)):
            how = Decoding(max_length=LENGTH, min_length=LENGTH, no_sample=not sampled)
            reply = partial(generate_replies, model, contexts[:count], self.special, how, memory=Memory())
            took = self.seconds(reply)
            yield {"work": f"{count} repl{'ies' if count > 1 else 'y'} of {LENGTH} tokens, "
                           f"{'nucleus' if sampled else 'greedy'}", "unit": "replies/s", "ours": count / took}

    def serving(self) -> Iterator[dict]:
        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer(self.tokenizer, folder)
            save_model(self.model(), folder)
            with server(folder, "bfloat16", self.args.device) as address:
                figures = asyncio.run(converse(address, conversations(self.table["valid"], 32, 4), 4, crowds=3))
        yield {"work": "web server, 32 conversations at once against one at a time", "unit": "replies/s",
               "ratio": figures["ours"] / figures["reference"], **figures}


def main() -> None:
    args = parse_args(__doc__.splitlines()[0], device="cuda", model="smollm2", turns=64, workers=2, warm_up=300,
                      repeats=100, seconds=480, parts=PARTS)
    if unknown := set(args.parts.split(",")) - set(PARTS.split(",")):
        raise SystemExit(f"--parts: no {', '.join(sorted(unknown))}; choose from {PARTS}")
    start, parts, rows = time.perf_counter(), Parts(args), []
    for part in args.parts.split(","):
        try:
            for row in getattr(parts, part)():
                rows.append(row | {"work": f"{row['work']}, bfloat16 on {args.device}"})
                if time.perf_counter() - start > args.seconds:
                    break
        except Exception:  # the GPU's time is short: the other parts still count
            traceback.print_exc()
        report("gpu", args, rows)
        if time.perf_counter() - start > args.seconds:
            print(f"stopped after {args.seconds} s")
            break


if __name__ == "__main__":
    main()
