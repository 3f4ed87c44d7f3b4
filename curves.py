"""Record a training run: ``metrics.json``, and curves, flags and sample replies for TensorBoard."""

import json
import logging
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from ignite.handlers.tensorboard_logger import TensorboardLogger
from ignite.metrics import RunningAverage
from ignite.metrics.metric import MetricUsage

import devices
from decoding import Decoding, fitted_context, generate_replies, readable
from files import METRICS, write_text
from inputs import Specials, TurnDataset
from model import DoubleHeadsModel
from tokenization import Tokenizer

# The format of ignite's progress bars.
BAR = "{desc}[{n_fmt}/{total_fmt}] {percentage:3.0f}%|{bar}{postfix} [{elapsed}<{remaining}, {rate_fmt}]"
SAMPLES = 3  # replies per epoch
LENGTH = 20  # tokens of a sample reply
GREEDY = Decoding(no_sample=True, max_length=LENGTH)

logger = logging.getLogger(__name__)


class Samples:
    """Decode greedy replies to a few validation turns, always the same turns, as Markdown."""

    def __init__(self, model: DoubleHeadsModel, tokenizer: Tokenizer, dataset: TurnDataset):
        self.model, self.tokenizer, self.dataset = model, tokenizer, dataset

    @torch.inference_mode()
    def __call__(self) -> str:
        training, special, shown = self.model.training, Specials.of(self.tokenizer), []
        # With --lora and --fp16, the type of the frozen weights; otherwise an empty set.
        half = {weight.dtype for weight in self.model.parameters()} - {torch.float32}
        self.model.eval()
        for turn in range(0, len(self.dataset), -(-len(self.dataset) // SAMPLES)):
            persona, history = self.dataset.context(turn)
            context = fitted_context(self.model, persona, history, special, LENGTH)
            with torch.autocast(self.model.device.type, next(iter(half), torch.bfloat16), enabled=bool(half)):
                reply = generate_replies(self.model, [context], special, GREEDY)[0]
            said = self.tokenizer.decode(history[-1]) if history else ""
            shown.append(f"> {said}\n\n{readable(self.tokenizer, reply)}")
        self.model.train(training)
        return "\n\n".join(shown)


def show_progress(trainer: Engine, device: str) -> None:
    """Show a progress bar with the running average of the losses that are read (`devices.read_every`)."""
    read = Events.ITERATION_COMPLETED(every=devices.read_every(device))
    RunningAverage(output_transform=lambda out: out["loss"]).attach(
        trainer, "loss", MetricUsage(Events.STARTED, read, read))
    ProgressBar(persist=True, bar_format=BAR, disable=not devices.is_first()).attach(
        trainer, metric_names=["loss"], event_name=read)


def attach_record(run: Path, trainer: Engine, evaluator: Engine) -> None:
    """Let each validation add its metrics to the run's ``metrics.json``, a list with an object per epoch.

    Values that are not finite become null. A resumed run keeps the earlier epochs. If the disk is full, the run
    continues without this record.
    """
    path = run / METRICS

    @evaluator.on(Events.COMPLETED)
    def record() -> None:
        if not devices.is_first():
            return
        epoch = trainer.state.epoch
        try:
            before = [row for row in json.loads(path.read_text("utf-8")) if row["epoch"] < epoch]
        except (OSError, ValueError, LookupError, TypeError):
            before = []
        row = {"epoch": epoch, "batches": trainer.state.iteration} | {
            name: float(value) if math.isfinite(value) else None for name, value in evaluator.state.metrics.items()}
        try:
            write_text(path, json.dumps([*before, row], indent=1) + "\n")
        except OSError as error:
            logger.warning("%s cannot be written (%s); training goes on", path, error.strerror or error)


def attach_curves(run: Path, trainer: Engine, evaluator: Engine, optimizer: torch.optim.Optimizer, args: Namespace,
                  samples: Callable[[], str]) -> TensorboardLogger:
    """Write losses, learning rate, validation metrics, the flags, and sample replies after each epoch for TensorBoard.

    The axis of all curves is the number of batches. With ``--shard`` there are no sample replies, because decoding
    would need all processes; with ``--compile`` there are none, because the network would be compiled again.
    """
    curves = tolerate_full_disk(TensorboardLogger(log_dir=run, write_to_disk=devices.is_first()))
    curves.attach_output_handler(trainer, Events.ITERATION_COMPLETED(every=devices.read_every(args.device)),
                                 tag="training", output_transform=lambda out: out)
    curves.attach_opt_params_handler(trainer, Events.ITERATION_STARTED, optimizer, param_name="lr")
    curves.attach_output_handler(evaluator, Events.COMPLETED, tag="validation", metric_names="all",
                                 global_step_transform=lambda *_: trainer.state.iteration)
    flags = "\n".join(f"| {name} | {value} |" for name, value in vars(args).items())
    curves.writer.add_text("flags", f"| flag | value |\n|---|---|\n{flags}")
    if devices.is_first() and not args.shard and not args.compile:
        evaluator.add_event_handler(
            Events.COMPLETED, lambda: curves.writer.add_text("replies", samples(), trainer.state.iteration))
    return curves


def tolerate_full_disk(curves: TensorboardLogger) -> TensorboardLogger:
    """Let a full disk end the curves, but not the run.

    tensorboardX writes in a thread, which a full disk or a jump of the clock would end; then training would wait for
    its full queue forever. So events are written immediately, without the thread.
    """
    if not devices.is_first():
        return curves  # the other processes write nothing
    writer = curves.writer.file_writer.event_writer
    events, ended = writer._ev_writer, False
    writer._worker.stop()

    def spare(write: Callable) -> Callable:
        def attempt(*args):
            nonlocal ended
            try:
                return None if ended else write(*args)
            except OSError as error:
                ended = True
                logger.warning("The curves for TensorBoard end here (%s); training goes on", error.strerror or error)
        return attempt

    writer.add_event = spare(lambda event: (events.write_event(event), events.flush()))
    events.flush, events.close = spare(events.flush), spare(events.close)
    return curves
