"""Resume interrupted trainings of reward models and policies from a single snapshot file.

A snapshot holds weights, optimizer state, the number of the step and the arguments of the training. Every step is
seeded with its number, so no random states are needed. The arguments are stored only here, so a command that fails
before the first snapshot leaves nothing that would refuse a corrected command.
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
    """Compare the arguments, except those that ``may_change``, with the folder's snapshot; return them to save.

    Raises `InputError`, which names the flag, if they differ, or if the folder cannot be written.
    """
    wanted = json.loads(json.dumps({name: value for name, value in vars(args).items() if name not in may_change}))
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "writable", "it is\n")  # fails at once if it cannot be written
        (run / "writable").unlink()
    except OSError as error:
        raise InputError(f"{run}: cannot be written ({error.strerror}); name a folder on a disk with room where you "
                         "may write") from None
    began = _snapshot_header(run).get("arguments", wanted)
    for name, value in wanted.items():
        if began.get(name) != value:
            raise InputError(f"--{name} {value}: {run} was begun with {began.get(name)!r}; use the same value to "
                             "continue, or name another folder")
    return {"arguments": wanted}


def check_preferences(run: Path, preferences: str) -> dict:
    """Compare a fingerprint of the preferences with the folder's snapshot, and return it for `save_snapshot`.

    Raises `InputError` if the snapshot was trained on other preferences, for example before more people answered.
    """
    if _snapshot_header(run).get("preferences", preferences) != preferences:
        raise InputError(f"{run}: was begun with other answers; name another folder to train on the present ones")
    return {"preferences": preferences}


def check_origin(run: Path) -> None:
    """Raise `InputError` if the folder has a finished model but no snapshot, so that another script made the model."""
    if not _snapshot_header(run):
        raise InputError(f"{run}: contains a model that another program made; name another folder")


def _snapshot_header(run: Path) -> dict:
    """Return the header of the folder's snapshot; empty if there is no usable snapshot."""
    try:
        return read_header(run / FILE) if (run / FILE).exists() else {}
    except InputError:
        return {}  # `restore_snapshot` warns of it


def save_snapshot(run: Path, network: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write weights, optimizer and ``state``, which must fit in JSON, completely or not at all."""
    tensors = {name: tensor.detach().cpu() for name, tensor in named_state(network, optimizer)}
    write_checkpoint(tensors, run / FILE, state)


def restore_snapshot(run: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> dict | None:
    """Restore weights and optimizer, in place, and return the ``state``.

    Return None if there is no snapshot, or, with a warning, if it is damaged. Raises `InputError` if it belongs to
    another model.
    """
    if not (run / FILE).exists():
        return None
    try:
        state = read_header(run / FILE, verify=True)
    except InputError as error:
        logger.warning("%s; training starts from the beginning", str(error).partition(";")[0])
        return None
    try:
        restore_state(run / FILE, network, optimizer)
    except (SafetensorError, OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{run / FILE}: not a snapshot of this training ({str(error).splitlines()[0][:160]}); delete "
                         "it to start again") from None
    return state
