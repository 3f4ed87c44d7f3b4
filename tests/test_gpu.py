"""Test that a training step reads nothing from the GPU, on CPUs by watching torch; and on a GPU, that it is right."""

import contextlib
import copy
import time
import weakref
from functools import partial

import pytest
import torch
import transformers
from conftest import SAMPLE, TINY
from torch.utils._python_dispatch import TorchDispatchMode

import devices
import train
from decoding import Decoding, generate_replies
from graphs import Graph, Recorded
from inputs import DialogDataset, TurnDataset, build_context, collate
from model import decoder_class
from packing import prepare_to_decode_
from schedule import AdamW
from sequences import sequences_for
from tokenization import get_tokenizer
from utils import get_dataset
from web.batching import Decoder
from web.clients import Client
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


@pytest.fixture(autouse=True)
def exact_products():
    """Multiply float32 exactly; `devices.prepare` chooses TF32."""
    yield
    torch.backends.cuda.matmul.fp32_precision = "ieee"


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return the tiny model, in evaluation mode and with weights far from zero, and a data set for it."""
    tokenizer, model = get_tokenizer(str(TINY)), load_model(str(TINY))
    add_special_tokens_(model, tokenizer)
    torch.manual_seed(3)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    split = get_dataset(tokenizer, str(SAMPLE), str(tmp_path_factory.mktemp("cache") / "c"))["valid"]
    return model.eval(), TurnDataset.for_model(model, split, tokenizer, num_candidates=4)


def test_graphs_that_are_not_needed_give_way(monkeypatch):
    """Record shapes in two places, with a stand-in for the GPU: four graphs at most, the unused ones go first."""
    monkeypatch.setattr("graphs.MOST_GRAPHS", 4)
    monkeypatch.setattr("graphs.UNUSED", 8)
    monkeypatch.setattr(Recorded, "everyone", weakref.WeakSet())

    class Again:
        def __init__(self, function, inputs):
            self.function, self.inputs, self.result = function, inputs, function(inputs, 2)

        def replay(self):
            self.result.copy_(self.function(self.inputs, 2))

    def record(self, function, batch, constant):
        again = Again(function, {name: tensor.clone() for name, tensor in batch.items()})
        return Graph(again, list(again.inputs.values()), again.result)

    monkeypatch.setattr(Recorded, "_record", record)
    one, other = Recorded(), Recorded()

    def call(recorded: Recorded, size: int) -> None:
        batch = {"numbers": torch.rand(size)}
        assert torch.equal(recorded(lambda batch, factor: factor * batch["numbers"], batch, 2), 2 * batch["numbers"])

    for size in (1, 1, 2, 2, 3, 3):
        call(one, size)
    for size in (1, 1, 2, 2):
        call(other, size)
    assert (len(one.graphs), len(other.graphs)) == (3, 1)  # the limit; the oldest was used eight calls ago
    for _ in range(3):
        call(one, 2)
    call(other, 2)
    assert [size for _, (_, (size,)) in one.graphs] == [2, 3] and len(other.graphs) == 2
    del other
    call(one, 4)
    call(one, 4)
    assert len(one.graphs) == 3


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fp16, tolerance", [("", 1e-4), ("bf16", 0.05)])
def test_losses_and_gradients_equal_those_of_the_cpu(tiny, compiled, fp16, tolerance):
    model, dataset = tiny
    batch = collate([dataset[row] for row in range(7)], dataset.special.pad, multiple=8)
    results = []
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(model)
        if compiled and device == "cuda":
            devices.compile_(own)
        network = devices.prepare(own, device, fp16 if device == "cuda" else "")
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        out = network(**{name: tensor.to(device) for name, tensor in batch.items()})
        (out.lm_loss + out.mc_loss).backward()
        results.append([out.lm_loss, out.mc_logits, *(weight.grad for weight in own.parameters())])
    least = 0.01 * torch.stack([exact.norm() for exact in results[0]]).max()  # some gradients are nothing but rounding
    for ours, exact in zip(results[1], results[0], strict=True):
        assert (ours.cpu() - exact).norm() < tolerance * max(exact.norm(), least)


@needs_gpu
@pytest.mark.parametrize("fp16, group", [("", 1), ("", 2), ("bf16", 1), ("O2", 2)])
def test_recorded_steps_train_like_others(tiny, fp16, group, monkeypatch):
    """Train on batches of three shapes, each four times, with CUDA graphs and without; compare losses and weights."""
    model, dataset = tiny
    args = train.parse_args(["--device", "cuda", "--fp16", fp16, "--lr", "1e-3"])
    args.gradient_accumulation_steps, recorded, results = group, [], []
    batches = 4 * [collate([dataset[row] for row in rows], dataset.special.pad, multiple=8)
                   for rows in ((0, 1), (40, 70, 99), (5, 12))]
    record = Recorded._record
    monkeypatch.setattr(Recorded, "_record", lambda self, *batch: recorded.append(1) or record(self, *batch))
    for decorator in (devices.recorded, lambda network, device: lambda function: function):
        monkeypatch.setattr(devices, "recorded", decorator)
        own, losses = copy.deepcopy(model), []
        for layer in own.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
        network = devices.prepare(own, "cuda", fp16)
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        trainer = train.create_trainer(network, AdamW(own.parameters(), 1e-3), devices.loss_scaler("cuda", fp16), args)
        trainer.add_event_handler(train.Events.ITERATION_COMPLETED,
                                  lambda engine, losses=losses: losses.append(engine.state.output["loss"].clone()))
        trainer.run(batches, max_epochs=1)
        results.append((torch.stack(losses).cpu(), own.transformer.h[0].mlp.c_fc.weight.detach().cpu()))
    assert len(recorded) == 3 * group  # the first batch of a step replaces the gradients, others add to them
    for ours, usual in zip(*results, strict=True):
        torch.testing.assert_close(ours, usual, rtol=0.02 if fp16 else 1e-4, atol=0.02 if fp16 else 1e-4)


@pytest.mark.parametrize("fp16, mc_coef", [("", 1.0), ("bf16", 1.0), ("bf16", 0.0), ("O2", 1.0)])
def test_gradients_in_fixed_places_train_like_others(tiny, fp16, mc_coef, monkeypatch):
    """Train as on GPUs, but without recording, and as on CPUs; compare losses and weights, which must be the same."""
    model, dataset = tiny
    args = train.parse_args(["--device", "cpu", "--fp16", fp16, "--lr", "1e-3", "--mc_coef", str(mc_coef)])
    args.gradient_accumulation_steps, results = 3, []
    batches = [collate([dataset[row] for row in rows], dataset.special.pad, multiple=8)
               for rows in ((0, 1), (40, 70, 99), (5, 12), (0,), (3, 4))]  # the second step has two batches
    monkeypatch.setattr(Recorded, "__call__", lambda self, function, batch, constant: function(batch, constant))
    for as_on_gpus in (False, True):
        own, losses = copy.deepcopy(model), []
        for layer in own.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
        network = devices.prepare(own, "cpu", fp16)
        if as_on_gpus:
            places = devices._RecordedGradients([*own.parameters()])
            monkeypatch.setattr(devices, "recorded", lambda network, device, places=places: partial(partial, places))
            if fp16 == "bf16":
                network.copied = [name for name, _ in own.named_parameters() if ".c_" in name]
        trainer = train.create_trainer(network, AdamW(own.parameters(), 1e-3), devices.loss_scaler("cpu", fp16), args)
        trainer.add_event_handler(train.Events.ITERATION_COMPLETED,
                                  lambda engine, losses=losses: losses.append(engine.state.output["loss"]))
        trainer.run(batches, max_epochs=2)
        assert trainer.state.step == 4
        results.append((torch.stack(losses), *own.parameters()))
    for ours, usual in zip(*results, strict=True):
        assert torch.equal(ours, usual)
    assert not torch.equal(results[0][1], model.transformer.wte.weight)


@needs_gpu
def test_replayed_steps_draw_new_dropout(tiny):
    model, dataset = tiny
    args = train.parse_args(["--device", "cuda", "--lr", "0"])
    args.gradient_accumulation_steps, losses = 1, []
    own = copy.deepcopy(model)
    trainer = train.create_trainer(devices.prepare(own, "cuda"), AdamW(own.parameters(), 0.0),
                                   devices.loss_scaler("cuda", ""), args)
    trainer.add_event_handler(train.Events.ITERATION_COMPLETED,
                              lambda engine: losses.append(float(engine.state.output["loss"])))
    trainer.run(6 * [collate([dataset[0], dataset[1]], dataset.special.pad, multiple=8)], max_epochs=1)
    assert len(set(losses)) == 6


@needs_gpu
def test_decoding_steps_equal_those_of_the_cpu(tiny):
    """Compare logits of eight steps, in a new room and in one that is used again; most steps are replayed."""
    model, dataset = tiny
    own, earlier = copy.deepcopy(model).to("cuda"), None
    for first in (0, 20):
        contexts = [build_context(*dataset.context(turn), dataset.special) for turn in range(first, first + 5)]
        with torch.inference_mode():
            usual = sequences_for(model, contexts, 1, 10)
            earlier = ours = sequences_for(own, contexts, 1, 10, earlier)
            torch.testing.assert_close(ours.logits.cpu(), usual.logits, atol=2e-3, rtol=1e-3)
            for step in range(8):
                tokens = [30 + 7 * step + row for row in range(5)]
                logits = [one.step(tokens, dataset.special.speaker1) for one in (ours, usual)]
                torch.testing.assert_close(logits[0].cpu(), logits[1], atol=2e-3, rtol=1e-3)


@needs_gpu
@pytest.mark.parametrize("how", [Decoding(no_sample=True), Decoding(num_beams=3), Decoding(top_k=1)])
def test_replies_equal_those_of_the_cpu(tiny, how):
    model, dataset = tiny
    contexts = [build_context(*dataset.context(turn), dataset.special) for turn in range(8)]
    replies = [generate_replies(copy.deepcopy(model).to(device), contexts, dataset.special, how)
               for device in ("cpu", "cuda")]
    assert replies[0] == replies[1] and any(replies[0])


@needs_gpu
@pytest.mark.parametrize("how", [Decoding(no_sample=True), Decoding(num_beams=3)])
def test_joined_layers_give_the_replies_of_the_cpu(tiny, how):
    """Decode with a model of Llama's kind, whose layers are computed in few operations."""
    _, dataset = tiny
    special, words = dataset.special, max(dataset.special) + 1
    config = transformers.LlamaConfig(
        vocab_size=words, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, speaker_ids=[special.speaker1, special.speaker2])
    torch.manual_seed(5)
    model = decoder_class(type(config))(config).eval()
    contexts = [build_context(*dataset.context(turn), special) for turn in range(8)]
    replies = [generate_replies(prepare_to_decode_(copy.deepcopy(model), device), contexts, special, how)
               for device in ("cpu", "cuda")]
    assert replies[0] == replies[1] and any(replies[0])


@needs_gpu
def test_the_server_answers_like_the_chat(tiny, monkeypatch):
    """Decode 40 replies in the server's batch, mostly in replayed passes; compare each with the same reply alone."""
    model, dataset = tiny
    own, recorded, record = copy.deepcopy(model).to("cuda"), [], Recorded._record
    contexts = [build_context(*dataset.context(turn), dataset.special) for turn in range(40)]
    ways = [Decoding(no_sample=True), Decoding(num_beams=3), Decoding(top_k=1, max_length=9)]
    expected = [generate_replies(own, [context], dataset.special, ways[turn % 3])[0]
                for turn, context in enumerate(contexts)]
    monkeypatch.setattr(Recorded, "_record", lambda self, *batch: recorded.append(1) or record(self, *batch))
    decoder = Decoder(own, dataset.special)
    replies = [decoder.submit(context, ways[turn % 3], Client("a", str(turn))) for turn, context in enumerate(contexts)]
    while not all(reply.finish for reply in replies):
        time.sleep(0.01)
    decoder.close()
    assert [reply.tokens for reply in replies] == expected and any(expected)
    assert 1 < len(recorded) < 30
