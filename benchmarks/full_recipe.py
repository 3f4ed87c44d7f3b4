"""Measure the recipe of 2019 on this machine: turns per second, share of the peak, and projected hours.

The recipe, 3 epochs over 131,438 turns with 4 candidates and 2 permutations, took an hour on eight V100s. The peak is
this device's best speed in large bfloat16 matrix products. The operations of packed rows are counted, padding included:
6 per weight of the body and position, and 6 per weight of the vocabulary and gold token.
"""

import time
import warnings
from argparse import Namespace

import torch
from ignite.engine import Engine, Events
from textbook import Bench, parse_args, report

import devices
from inputs import IGNORED, TurnDataset, get_loader
from layers import product
from model import DoubleHeadsModel
from schedule import AdamW
from train import create_trainer
from weights import linear_layers

TURNS = 131_438 * 2 * 3


def peak(device: str, dtype: torch.dtype = torch.bfloat16) -> float:
    """Measure the operations per second of large matrix products, as linear layers compute them, the best of ten."""
    size = 8192 if device != "cpu" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        product(a, b)
        synchronize(device)
        best = max(best, 2 * size ** 3 / (time.perf_counter() - start))
    return best


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def measure(model: DoubleHeadsModel, dataset: TurnDataset, args: Namespace, compiled: bool = False) -> dict[str, float]:
    """Time steps of train.py's trainer over consecutive batches, including building and moving them.

    Of ``args``, ``device``, ``turns`` per batch, ``workers``, ``warm_up`` and ``repeats`` (batches), and ``seed`` are
    used. Return figures, on GPUs with the number of times that the CPU waits for the GPU in a step. The projected time
    includes what the warm-up took longer than as many later batches: compiling, and recording CUDA graphs.
    """
    if compiled:
        devices.compile_(model)
    network = devices.prepare(model, args.device, "bf16")
    optimizer, on_gpu = AdamW(model.parameters(), 6.25e-5), args.device != "cpu"
    trainer = create_trainer(network, optimizer, devices.loss_scaler(args.device, "bf16"), Namespace(
        device=args.device, gradient_accumulation_steps=1, lm_coef=1.0, mc_coef=1.0, max_norm=1.0))
    loader = get_loader(dataset, dataset.lengths()[0], args.turns, seed=args.seed, num_workers=args.workers,
                        pin_memory=on_gpu)
    body = sum(layer.weight.numel() for layer in linear_layers(model))
    vocabulary = model.get_output_embeddings().weight.numel()
    found = dict.fromkeys(("work", "turns", "start"), 0.0)

    @trainer.on(Events.ITERATION_STARTED)
    def count(engine: Engine) -> None:
        if engine.state.iteration == args.warm_up + 1:
            synchronize(args.device)
            if on_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            found.update(work=0.0, turns=0.0, start=time.perf_counter())
        batch = engine.state.batch
        gold = int((batch["labels"] != IGNORED).sum())
        found["work"] += 6 * (body * batch["input_ids"].numel() + vocabulary * gold)
        found["turns"] += int((batch["mc_labels"] != IGNORED).sum())

    begun = time.perf_counter()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        trainer.run(loader, max_epochs=1, epoch_length=args.warm_up + args.repeats)
    if on_gpu:
        torch.cuda.set_sync_debug_mode("default")
    synchronize(args.device)
    seconds = time.perf_counter() - found["start"]
    to_start = max(0.0, found["start"] - begun - seconds * args.warm_up / args.repeats)
    top = peak(args.device)
    figures = {"ours": found["turns"] / seconds, "share of the bfloat16 peak": found["work"] / seconds / top,
               "peak, TFLOP/s": top / 1e12,
               "hours for 3 epochs of 2 permutations": (to_start + TURNS * seconds / found["turns"]) / 3600}
    if on_gpu:
        figures["seconds to start"] = to_start
        waited = sum("called a synchronizing" in str(one.message) for one in waits)
        figures["waits for the GPU per step"] = waited / args.repeats
        figures["peak memory, GiB"] = torch.cuda.max_memory_allocated() / 2 ** 30
    return figures


def main() -> None:
    args = parse_args(__doc__.splitlines()[0], device="cpu", turns=16, workers=0, warm_up=2)
    bench = Bench(args)
    row = {"work": f"full recipe on {args.device}, 4 candidates, bfloat16", "unit": "turns/s"}
    report("full_recipe", args, [row | measure(bench.ours, bench.dataset("train", 4), args)])


if __name__ == "__main__":
    main()
