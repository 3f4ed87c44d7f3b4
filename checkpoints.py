"""Resume interrupted runs: checkpoints and stop signals.

A checkpoint is one safetensors file, ``RUN/checkpoints/step-120.safetensors``, with tensors, a JSON header for all
other state, and a hash of both. Reading it runs no code. It always describes the run after a whole optimizer step.
"""

import json
import logging
import math
import random
import signal
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import torch
from filelock import FileLock, Timeout
from ignite.engine import Engine, Events
from ignite.utils import manual_seed
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.data import DataLoader

import devices
from cli import InputError, positive_number, whole_number
from files import ARGUMENTS, distinct_tensors, read_header, step_files, write_checkpoint, write_text
from tokenization import Tokenizer, save_tokenizer
from utils import make_logdir
from weights import save_model

# Flags that may change when a run is resumed: they say where it runs, where its files are, and how many it writes.
MAY_CHANGE = {"resume", "device", "local_rank", "num_workers", "shard", "compile", "dataset_path", "dataset_cache",
              "data_dir", "model_checkpoint", "valid_batch_size", "eval_before_start", "checkpoint_every",
              "keep_checkpoints"}

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run: writes and reads them, and stops the run on signals and bad losses.

    Every process has such an object and calls its methods at the same points; the first process writes. ``schedule``:
    the learning-rate schedule. The arguments ``resume``, ``n_epochs``, ``checkpoint_every``, ``keep_checkpoints`` and
    ``device`` are used.
    """

    def __init__(self, run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                 schedule, args: Namespace):
        self.run_folder, self.folder, self.args = run, run / "checkpoints", args
        self.model, self.optimizer, self.scaler, self.schedule = model, optimizer, scaler, schedule
        self.signal, self.refused, self.model_saved = 0, set(), True
        self.read_every, self.unread = devices.read_every(args.device), []

    def run(self, trainer: Engine, evaluator: Engine, loader: DataLoader) -> None:
        """Run the trainer over all epochs, or, with ``--resume``, over those that remain.

        ``trainer.state.step`` counts optimizer steps. On SIGTERM or SIGINT the current batch is finished, a checkpoint
        is saved, and the process exits with status 143 or 130. Raises `InputError` if another process is training this
        run, if the checkpoint does not fit, if a loss is not a finite number, or if the final weights could not be
        written.
        """
        self.loader = loader
        self.facts = {"data": loader.dataset.split.table.metadata["key"], "batches an epoch": len(loader)}
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._note_loss)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._after_batch)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._stop_if_told)
        self.mark(step=0, iteration=0)
        with self._alone(), self._signals_noted():
            if self.args.resume:
                header = self.restore(Path(self.args.resume))
                trainer.load_state_dict({"iteration": header["iteration"], "epoch_length": len(loader),
                                         "max_epochs": self.args.n_epochs})
                trainer.state.step = header["step"]
                logger.info("Continuing after step %d", header["step"])
                if header["iteration"] and header["iteration"] % len(loader) == 0 and header["nll"] is None:
                    trainer.fire_event(Events.EPOCH_COMPLETED)  # the run was stopped before this epoch's validation
            if trainer.state.iteration < self.args.n_epochs * len(loader):
                trainer.run(loader, max_epochs=self.args.n_epochs)
        if not self.model_saved:
            raise InputError(f"{self.run_folder}: training is complete, but the weights could not be written; make "
                             f"room, then use --resume {self.run_folder} ({self._last()})")

    def _note_loss(self, engine: Engine) -> None:
        state = engine.state
        norm = devices.unsharded(torch.as_tensor(state.gradient_norm))
        self.unread.append((state.iteration, self.place["step"] + 1, state.output["loss"], norm))
        if len(self.unread) >= self.read_every:
            self._check_losses()

    def _check_losses(self) -> None:
        """End the run if one of the losses or norms that were not read so far is not finite."""
        for iteration, step, loss, norm in self.unread:
            # With loss scaling, infinite gradients are normal: the scaler skips the step and lowers the scale.
            if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled()):
                continue
            loader = self.loader
            batch = loader.batch_sampler.batches()[(iteration - 1) % len(loader)]
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradients' norm is {norm}"
            devices.end_all(f"{what} in step {step}, on {', '.join(map(loader.dataset.place, batch))}; lower --lr, or "
                            f"look at these entries of the data ({self._last()})")
        self.unread.clear()

    def _after_batch(self, engine: Engine) -> None:
        state, every = engine.state, self.args.checkpoint_every
        if state.step > self.place["step"]:
            self.mark(state.step, state.iteration)
            if every and state.step % every == 0 and state.iteration % state.epoch_length:  # epochs end with a save
                self.save()
        self._stop_if_told(engine)

    def _stop_if_told(self, engine: Engine) -> None:
        if engine.state.iteration % self.read_every:
            return
        if number := devices.max_over_processes(self.signal):  # processes receive it at different batches
            self.save()
            logger.info("Stopped after step %d; continue with --resume %s", self.place["step"], self.run_folder)
            raise SystemExit(128 + number)

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        def note(number: int, frame) -> None:
            self.signal = number

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from training in this folder, and delete unfinished files of a killed run."""
        if not devices.is_first():
            yield
            return
        lock = FileLock(self.run_folder / "training.lock")
        try:
            lock.acquire(timeout=0)
            for unfinished in [*self.run_folder.glob("*.unfinished"), *self.folder.glob("*.unfinished")]:
                unfinished.unlink(missing_ok=True)
        except Timeout:
            raise InputError(f"{self.run_folder}: another process is training this run; end it first") from None
        except OSError as error:
            raise InputError(f"{self.run_folder}: cannot be written ({error.strerror}); give a run that you may "
                             "write to") from None
        with lock:
            yield

    def mark(self, step: int, iteration: int) -> None:
        """Note the state after a whole optimizer step; `save` describes this state until the next call.

        Later batches, of an unfinished step, change only the random generators and the schedule, whose states are
        therefore copied here. A resumed run computes those batches again.
        """
        self.place = {"step": step, "iteration": iteration, "schedule": self.schedule.state_dict()}
        self.streams = _random_streams(self.args.device)

    def save(self, nll: float | None = None) -> None:
        """Write a checkpoint of the state at the last `mark`, and delete old checkpoints.

        ``nll``: the validation loss of these weights at the end of an epoch, in nats per token; None if there was no
        validation. If the disk is full, the run continues without this checkpoint.
        """
        self._check_losses()
        header = self.place | self.facts | {
            "config": self.model.config.to_diff_dict(), "nll": nll, "scaler": self.scaler.state_dict(),
            "streams": devices.gather(_to_json(self.streams))}
        path = self.folder / f"step-{header['step']}.safetensors"

        def write(tensors: dict[str, torch.Tensor]) -> None:
            self.folder.mkdir(exist_ok=True)
            write_checkpoint(tensors, path, header)
            self._remove_old()

        self._write(path.relative_to(self.run_folder), named_state(self.model, self.optimizer), write)

    def save_model(self) -> None:
        """Write the current weights as the run folder's model; if the disk is full, keep the old model."""
        self._check_losses()
        self.model_saved = self._write(Path("model.safetensors"), self.model.state_dict().items(),
                                       lambda weights: save_model(self.model, self.run_folder, weights))

    def _write(self, what: Path, tensors: Iterable[tuple[str, torch.Tensor]], write: Callable) -> bool:
        """Gather tensors by name and let the first process ``write`` them; return whether this succeeded."""
        gathered = {}
        for name, tensor in tensors:
            tensor = devices.unsharded(tensor)
            if devices.is_first():
                gathered[name] = tensor.cpu()
        worked = not devices.is_first() or self._attempt(what, lambda: write(gathered))
        devices.wait_for_all()
        return worked

    def _attempt(self, what: Path, write: Callable[[], None]) -> bool:
        """Call ``write()`` and return whether it succeeded; repeated failures are reported once."""
        kind = what.parent  # checkpoints, or the model
        try:
            write()
        except OSError as error:
            if kind not in self.refused:
                logger.warning("%s/%s cannot be written (%s). Training goes on, %s. Make room", self.run_folder,
                               what, error.strerror or error, self._last())
            self.refused.add(kind)
            return False
        if kind in self.refused:
            logger.warning("%s/%s can be written again", self.run_folder, what)
        self.refused.discard(kind)
        return True

    def _last(self) -> str:
        """Return a phrase that names the checkpoint from which a resumed run would continue."""
        found = step_files(self.run_folder)
        return f"{found[-1].name} is kept" if found else "there is no checkpoint yet"

    def _remove_old(self) -> None:
        files = step_files(self.run_folder)
        validated = {}
        for path in files:
            try:
                validated[path] = read_header(path)["nll"]
            except InputError:
                continue  # a damaged checkpoint has no known loss
        best = min((path for path in validated if validated[path] is not None), key=validated.get, default=None)
        for path in files[:-self.args.keep_checkpoints]:
            if path != best:
                path.unlink(missing_ok=True)

    def restore(self, path: Path) -> dict:
        """Restore all state from a checkpoint and return its header. Raises `InputError` if it does not fit."""
        header = read_header(path)
        for name, now in self.facts.items():
            if header.get(name) != now:
                raise InputError(f"{path}: cannot be resumed: its {name} was {header.get(name)} and is now {now}; "
                                 "use the same data and flags as at its start")
        try:
            restore_state(path, self.model, self.optimizer)
            self.scaler.load_state_dict(header["scaler"])
            self.schedule.load_state_dict(header["schedule"])
            _restore_streams(header["streams"], header["step"], self.args.device)
            self.mark(header["step"], header["iteration"])
        except (SafetensorError, OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"{path}: is not a checkpoint of this run's model "
                             f"({str(error).splitlines()[0][:160]}); give another one") from None
        return header


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a checkpoint by name: ``model.WEIGHT`` and ``optimizer.FIELD.WEIGHT``.

    Persistent buffers are included; a tensor with several names is included once.
    """
    for name, tensor in distinct_tensors(model).items():
        yield f"model.{name}", tensor
    for name, weight in model.named_parameters():
        for field, tensor in optimizer.state.get(weight, {}).items():
            yield f"optimizer.{field}.{name}", tensor


@torch.no_grad()
def restore_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Set a model and its optimizer, in place, to the `named_state` in a checkpoint.

    Raises ``SafetensorError``, ``OSError``, ``RuntimeError``, ``LookupError`` or ``ValueError`` where it does not fit.
    """
    with safe_open(path, framework="pt") as file:
        for name, tensor in distinct_tensors(model).items():
            tensor.copy_(devices.placed_like(file.get_tensor(f"model.{name}"), tensor))
        weights = dict(model.named_parameters())
        for key in file.keys():
            if key.startswith("optimizer."):
                _, field, name = key.split(".", 2)
                value, weight = file.get_tensor(key), weights[name]
                if value.ndim:
                    value = devices.placed_like(value, weight)
                elif optimizer.defaults.get("fused"):  # fused: counts on the weights' device
                    value = value.to(weight.device)
                optimizer.state[weight][field] = value


def find_checkpoint(resume: str) -> tuple[Path, Path]:
    """Return the run folder and the checkpoint that ``--resume`` names.

    ``resume`` is a checkpoint, or a run folder, which stands for its last checkpoint. A damaged last checkpoint is
    skipped with a warning. Raises `InputError` if there is no checkpoint, or the named one is damaged.
    """
    path = Path(resume)
    if path.suffix == ".safetensors":
        read_header(path, verify=True)
        return _run_of(path), path
    try:
        if not (path / ARGUMENTS).is_file():
            raise InputError(f"--resume {path}: is not a run folder, it has no {ARGUMENTS}; give a folder under runs/")
        files = step_files(path)
    except OSError as error:
        raise InputError(f"--resume {path}: cannot be read ({error.strerror}); give a folder you may read") from None
    for file in reversed(files):
        try:
            read_header(file, verify=True)
            return path, file
        except InputError as error:
            logger.warning("%s; trying the one before", error)
    raise InputError(f"--resume {path}: has no checkpoint (one is written at the end of an epoch, every "
                     "--checkpoint_every steps, and on SIGTERM or Ctrl-C); start a new run")


def _run_of(checkpoint: Path) -> Path:
    return checkpoint.parent.parent if len(checkpoint.parts) > 2 else checkpoint.absolute().parents[1]


def open_run_folder(args: Namespace, tokenizer: Tokenizer) -> Path:
    """Return the run folder, in all processes: that of ``--resume``, or a new one with the tokenizer and arguments."""
    if args.resume:
        return _run_of(Path(args.resume))
    run = Path(idist.broadcast(make_logdir(args.model_checkpoint) if devices.is_first() else None, safe_mode=True))
    if devices.is_first():
        try:
            save_tokenizer(tokenizer, run)
            write_text(run / ARGUMENTS, json.dumps(vars(args), indent=2) + "\n")
        except OSError as error:
            raise InputError(f"{run}: cannot be written ({error.strerror or error}); make room, or start "
                             "in another folder") from None
    return run


def parse_resumable(parser: ArgumentParser, argv: list[str] | None = None) -> Namespace:
    """Parse ``argv``, by default the command line, with the flags of checkpoints.

    A resumed run keeps most flags that it began with. Raises `InputError` when these cannot be read, or ``argv`` wants
    others.
    """
    add = parser.add_argument_group("checkpoints").add_argument
    add("--checkpoint_every", type=whole_number, default=0, metavar="N",
        help="optimizer steps between checkpoints; 0: one per epoch, which there always is (default: %(default)s)")
    add("--keep_checkpoints", type=positive_number, default=3, metavar="K",
        help="keep the last K and the one of the lowest validation loss (default: %(default)s)")
    add("--resume", default="", metavar="RUN", help="continue a run from its last checkpoint, with its own flags")
    args = parser.parse_args(argv)
    if not args.resume:
        return args
    run, checkpoint = find_checkpoint(args.resume)
    path = run / ARGUMENTS
    try:
        began = json.loads(path.read_text("utf-8"))
        began = {name: began[name] for name in vars(args) if name in began}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); the run cannot be resumed without it") from None
    here = ("resume", "device", "local_rank")
    parser.set_defaults(**{name: value for name, value in began.items() if name not in here})
    args = parser.parse_args(argv)
    for name, value in began.items():
        if name not in MAY_CHANGE and getattr(args, name) != value:
            raise InputError(f"--{name} {getattr(args, name)}: the run began with {value!r}, which cannot change; "
                             "leave the flag out, or start a new run")
    args.resume = str(checkpoint)
    return args


def _random_streams(device: str) -> dict:
    """Return the states of this process's random generators, including that of ``device``."""
    cuda = torch.cuda.get_rng_state(device) if _on_gpu(device) and torch.cuda.is_initialized() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(legacy=False), "torch": torch.get_rng_state(),
            "cuda": cuda}


def _to_json(streams: dict) -> dict:
    words = streams["numpy"]["state"]
    return {
        "python": streams["python"],
        "numpy": streams["numpy"] | {"state": words | {"key": words["key"].tolist()}},
        **{name: streams[name] is not None and bytes(streams[name].tolist()).hex() for name in ("torch", "cuda")},
    }


def _restore_streams(all_streams: list[dict], step: int, device: str) -> None:
    """Restore this process's random generators from its rank's states; additional processes get new seeds."""
    rank = idist.get_rank()
    if rank >= len(all_streams):
        manual_seed(1_000_003 * rank + step)
        return
    streams = all_streams[rank]
    version, words, gauss = streams["python"]
    random.setstate((version, tuple(words), gauss))
    words = streams["numpy"]["state"]
    np.random.set_state(streams["numpy"] | {"state": words | {"key": np.array(words["key"], np.uint32)}})
    torch.set_rng_state(_bytes(streams["torch"]))
    if streams["cuda"] and _on_gpu(device) and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(_bytes(streams["cuda"]), device)


def _on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
