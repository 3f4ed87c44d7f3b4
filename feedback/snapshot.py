"""One file that a training stopped before its end goes on from: weights, optimizer and place.

Trainings here seed every step with its number, so that a place is just that number.
"""

import json
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from cli import InputError
from tables import write_tensors

FILE, ARGUMENTS = "unfinished.safetensors", "feedback_args.json"


def check_arguments(run: Path, args: Namespace, may_change: set[str]) -> None:
    """Note in a run folder what it was started with; later, that it is started again with the same.

    Raises `InputError` naming the flag that differs, or when the folder cannot be written.
    """
    wanted = {name: value for name, value in vars(args).items() if name not in may_change}
    path = run / ARGUMENTS
    try:
        run.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            unfinished = path.with_name(path.name + ".unfinished")
            unfinished.write_text(json.dumps(wanted, indent=2) + "\n", "utf-8")
            os.replace(unfinished, path)
        began = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{run}: cannot be written ({error.strerror}); name a folder that can") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); mend it, or delete the folder and start anew") from None
    for name, value in json.loads(json.dumps(wanted)).items():
        if began.get(name) != value:
            raise InputError(f"--{name} {value}: {run} was begun with {began.get(name)!r}; give the same to go on, or "
                             "name another folder")


def check_same(run: Path, preferences: str) -> None:
    """Note in a run folder which preferences it learns from (their fingerprint); later, that they are still the same.

    Raises `InputError` when they are not: people have gone on answering.
    """
    path = run / "preferences"
    if not path.exists():
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text(preferences, "utf-8")
        os.replace(unfinished, path)
    if path.read_text("utf-8") != preferences:
        raise InputError(f"{run}: was begun with other answers than there are now; name another folder for these")


def _tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights, those that are one under two names once, and what the optimizer keeps of each."""
    for name, weight in network.named_parameters():
        yield f"model.{name}", weight.detach()
        for field, value in optimizer.state.get(weight, {}).items():
            yield f"optimizer.{field}.{name}", value


def save_snapshot(run: Path, network: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write weights, optimizer and ``state``, which JSON can hold, complete or not at all."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _tensors(network, optimizer)}
    write_tensors(tensors, run / FILE, {"state": json.dumps(state)})


@torch.no_grad()
def restore_snapshot(run: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> dict | None:
    """Put weights and optimizer back, in place, and return the ``state``; None where there is no snapshot.

    Raises `InputError` when it is damaged or of another model.
    """
    if not (run / FILE).exists():
        return None
    try:
        with safe_open(run / FILE, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            for name, weight in network.named_parameters():
                weight.copy_(file.get_tensor(f"model.{name}"))
            weights = dict(network.named_parameters())
            for key in file.keys():
                kind, _, rest = key.partition(".")
                if kind == "optimizer":
                    field, name = rest.split(".", 1)
                    value = file.get_tensor(key)
                    beside = value.ndim or optimizer.defaults.get("fused")  # where the count of steps is kept
                    optimizer.state[weights[name]][field] = value.to(weights[name].device) if beside else value
    except (SafetensorError, OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{run / FILE}: no snapshot of this training ({str(error).splitlines()[0][:160]}); delete it "
                         "to start anew") from None
    return state
