"""One file that a training stopped before its end goes on from: weights, optimizer, place, and how it was started.

Trainings here seed every step with its number, so that a place is just that number. What a training was started with is
noted in its snapshots and nowhere else: until the first one there is nothing that other arguments could spoil.
"""

import json
import logging
from argparse import Namespace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from checkpoints import named_state, restore_state
from cli import InputError
from files import read_header, write_checkpoint, write_text

FILE = "unfinished.safetensors"
logger = logging.getLogger("feedback.snapshot")


def check_arguments(run: Path, args: Namespace, may_change: set[str]) -> dict:
    """What `save_snapshot` is to note of the arguments; all of them count but those that ``may_change``.

    Raises `InputError` naming the flag in which the folder's snapshot differs, or when the folder cannot be written.
    """
    wanted = json.loads(json.dumps({name: value for name, value in vars(args).items() if name not in may_change}))
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "writable", "it is\n")  # which is better known before the work than after
        (run / "writable").unlink()
    except OSError as error:
        raise InputError(f"{run}: cannot be written ({error.strerror}); name a folder with room that can") from None
    began = _snapshot_header(run).get("arguments", wanted)
    for name, value in wanted.items():
        if began.get(name) != value:
            raise InputError(f"--{name} {value}: {run} was begun with {began.get(name)!r}; give the same to go on, or "
                             "name another folder")
    return {"arguments": wanted}


def check_preferences(run: Path, preferences: str) -> dict:
    """What `save_snapshot` is to note of the preferences that are learnt from, given their fingerprint.

    Raises `InputError` when the folder's snapshot has learnt from others: people have gone on answering.
    """
    if _snapshot_header(run).get("preferences", preferences) != preferences:
        raise InputError(f"{run}: was begun with other answers than there are now; name another folder for these")
    return {"preferences": preferences}


def check_origin(run: Path) -> None:
    """Raise `InputError` when a model in the folder, which looks finished, is no training's that left a snapshot."""
    if not _snapshot_header(run):
        raise InputError(f"{run}: holds a model that was made otherwise; name another folder")


def _snapshot_header(run: Path) -> dict:
    """The header of the folder's snapshot; empty where there is none to go on from."""
    try:
        return read_header(run / FILE) if (run / FILE).exists() else {}
    except InputError:
        return {}  # `restore_snapshot` says so


def save_snapshot(run: Path, network: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write weights, optimizer and ``state``, which JSON can hold, complete or not at all."""
    tensors = {name: tensor.detach().cpu() for name, tensor in named_state(network, optimizer)}
    write_checkpoint(tensors, run / FILE, state)


def restore_snapshot(run: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> dict | None:
    """Put weights and optimizer back, in place, and return the ``state``.

    None where there is no snapshot, or a damaged one, which is passed over with a warning. Raises `InputError` when it
    is another model's.
    """
    if not (run / FILE).exists():
        return None
    try:
        state = read_header(run / FILE, whole=True)
    except InputError as error:
        logger.warning("%s; the training begins anew", str(error).partition(";")[0])
        return None
    try:
        restore_state(run / FILE, network, optimizer)
    except (SafetensorError, OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{run / FILE}: no snapshot of this training ({str(error).splitlines()[0][:160]}); delete it "
                         "to start anew") from None
    return state
