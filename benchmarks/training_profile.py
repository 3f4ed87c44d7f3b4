"""Measure the share of each kind of operation in a training step, with two candidates, in bfloat16 and float32."""

from argparse import Namespace
from collections import Counter

import torch
from full_recipe import peak
from textbook import Bench, parse_args, report
from torch.profiler import profile
from training import learn, typical_batches

from inputs import IGNORED
from model import autocast

KINDS = {  # by the names of torch's operations
    "matrix products": ("mm", "addmm", "linear", "mkldnn_linear", "mkldnn::_linear_pointwise", "_Linear",
                        "_LinearBackward"),
    "attention": ("bmm", "baddbmm", "_softmax", "_softmax_backward_data", "_safe_softmax", "isneginf", "all",
                  "_Attention", "_AttentionBackward"),
    "dropout masks": ("bernoulli_", "_Dropout", "_DropoutBackward", "ge"),
    "copies and casts": ("copy_", "cat", "clone"),
    "zero-filling": ("fill_", "zero_"),
    "GELU": ("gelu", "gelu_backward"),
    "optimizer": ("_fused_adamw_", "linalg_vector_norm", "_foreach_mul_", "_foreach_norm"),
}


def measure(bench: Bench, args: Namespace, half: str, dtype: torch.dtype) -> dict:
    """Profile some steps after two warm-up steps, and return a row with the share of each kind of operation."""
    model = bench.ours.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6.25e-5, fused=True)
    dataset = bench.dataset("train", 2)
    batches = typical_batches(dataset, args.turns, args.seed, args.repeats, bench.special.pad)

    def steps(batches: list[dict[str, torch.Tensor]]) -> None:
        for batch in batches:
            with autocast("cpu", half):
                out = model(**batch)
            learn(optimizer, out.lm_loss + out.mc_loss)

    steps(batches[-2:])
    with profile() as record:
        steps(batches)
    times, work = Counter(), 0
    for operation in record.key_averages():
        name = operation.key.removeprefix("aten::")
        kind = next((kind for kind, names in KINDS.items() if name in names), "all else")
        times[kind] += operation.self_cpu_time_total / 1e6 / args.repeats
    body = sum(parameter.numel() for block in model.transformer.h for parameter in block.parameters())
    for batch in batches:
        gold = int((batch["labels"] != IGNORED).sum())
        work += 6 * (body * batch["input_ids"].numel() + model.lm_head.weight.numel() * gold)
    return {"work": f"where a training step goes, 2 candidates, {half or 'float32'}", "unit": "s per step",
            "ours": times.total(), "at the peak of matrix products, s": work / args.repeats / peak("cpu", dtype),
            **{f"{kind}, %": 100 * seconds / times.total() for kind, seconds in times.most_common()}}


def main() -> None:
    args = parse_args(__doc__, turns=32)
    report("training_profile", args, [measure(Bench(args), args, half, dtype)
                                      for half, dtype in (("bf16", torch.bfloat16), ("", torch.float32))])


if __name__ == "__main__":
    main()
