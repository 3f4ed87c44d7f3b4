"""Test that a training step needs no number from the GPU: on a GPU if there is one, and on CPUs by watching torch."""

import contextlib

import pytest
import torch
from conftest import SAMPLE, TINY
from torch.utils._python_dispatch import TorchDispatchMode

import devices
import train
from inputs import DialogDataset, TurnDataset, collate
from schedule import AdamW
from tokenization import get_tokenizer
from utils import get_dataset
from weights import add_special_tokens_, load_model

# The operations for which the CPU waits for a GPU, because their result, or its shape, depends on values.
aten = torch.ops.aten
READING = (aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.unique_dim,
           aten._unique2, aten.unique_consecutive)


class NoReads(TorchDispatchMode):
    """Raise an error when an operation reads values of a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in READING:
            raise AssertionError(f"{func} reads a tensor")
        if func.overloadpacket in (aten.index, aten.index_put_) and any(
                index is not None and index.dtype == torch.bool for index in args[1]):
            raise AssertionError(f"{func} with a mask reads it")
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def synchronising_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rows", [TurnDataset, DialogDataset])
def test_a_training_step_reads_nothing(rows, tmp_path):
    on_gpu = torch.cuda.is_available()
    args = train.parse_args(["--device", "cuda" if on_gpu else "cpu", "--fp16", "bf16", "--lr", "1e-3"])
    args.gradient_accumulation_steps = 2
    tokenizer, model = get_tokenizer(str(TINY)), load_model(str(TINY))
    add_special_tokens_(model, tokenizer)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout) and not on_gpu:
            layer.p = 0.0  # on CPUs, a number seeds each mask
    if not on_gpu:
        model.set_attn_implementation("sdpa")  # as GPUs compute attention; our own for CPUs looks for blocks
    split = get_dataset(tokenizer, str(SAMPLE), str(tmp_path / "cache"))["train"]
    dataset = rows.for_model(model, split, tokenizer, num_candidates=4)
    batches = [collate([dataset[row] for row in (first, first + 1)], dataset.special.pad, multiple=8)
               for first in (0, 3, 5, 8, 9, 14)]
    network = devices.prepare(model, args.device, args.fp16)
    optimizer = AdamW(model.parameters(), args.lr)
    trainer = train.create_trainer(network, optimizer, devices.loss_scaler(args.device, args.fp16), args)
    before, outputs, step = model.lm_head.weight.detach().clone(), [], trainer._process_function

    def watched(engine, batch):
        if engine.state.iteration <= 4:  # the first step creates the optimizer's state, the second finds it
            return step(engine, batch)
        with synchronising_is_an_error() if on_gpu else NoReads():
            return step(engine, batch)

    trainer._process_function = watched
    trainer.add_event_handler(train.Events.ITERATION_COMPLETED,
                              lambda engine: outputs.append(engine.state.output["loss"]))
    trainer.run(batches, max_epochs=1)
    assert trainer.state.step == 3 and not torch.equal(before, model.lm_head.weight)
    assert torch.stack(outputs).isfinite().all()
