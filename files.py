"""Files that are there whole or not at all; tensors in them, with a hash by which a changed byte is noticed; and the
checkpoints of a training as such files.

Knows bytes, tensors and names; nothing of text, networks or trainings.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cli import InputError

FORMAT = "transfertransfo checkpoint 2"
WITHOUT_HASH = "transfertransfo checkpoint 1"  # otherwise the same
# In the folder of a run:
ARGUMENTS = "training_args.json"
METRICS = "metrics.json"  # of the validation split, an object per epoch


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name under which to write the new contents of ``path``, which take its place when the block ends well.

    When this returns, they are on the disk. An error in the block leaves ``path`` as it was.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        sync(unfinished)  # a crash of the machine must not leave the new name on empty blocks
        os.replace(unfinished, path)
        sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file to the disk, complete or not at all. Raises ``OSError`` when it cannot be written."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, "utf-8")


def sync(path: Path) -> None:
    """Return when a file's contents, or a folder's names, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's bytes. Raises ``OSError`` when it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_error(error: Exception, path: Path) -> OSError:
    """What a library written in Rust says of a failed write, as the ``OSError`` that Python itself would raise."""
    number = re.search(r"os error (\d+)", str(error))
    code = int(number[1]) if number else errno.EIO
    return OSError(code, os.strerror(code) if number else str(error), str(path))


# ------------------------------------------------------------------------------------------------------ tensors


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file to the disk, complete or not at all. Raises ``OSError`` when it cannot be written."""
    with replacing(path) as unfinished:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # what the umask gives; the library itself lets nobody else read
        try:
            save_file(dict(tensors), unfinished, metadata=metadata)
        except SafetensorError as error:
            raise disk_error(error, path) from None
        unfinished.chmod(mode)


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]], text: str = "") -> str:
    """Hash ``tensors``, in the order given, and a text.

    The same names, types, shapes and numbers have the same hash, whichever file they lie in.
    """
    hashed = hashlib.sha256(text.encode())
    for name, tensor in tensors:
        hashed.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():  # an empty one has no bytes to view
            hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def distinct_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights and lasting buffers by name, those that are one under several names under the first."""
    state, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            state[name] = tensor
            seen.add(id(tensor))
    return state


# -------------------------------------------------------------------------------------------------- checkpoints


def write_checkpoint(tensors: Mapping[str, torch.Tensor], path: Path, header: dict) -> None:
    """Write tensors and ``header``, which JSON can hold, with a hash of both. Raises ``OSError`` as `write_tensors`."""
    state = json.dumps(header | {"format": FORMAT})
    write_tensors(tensors, path, {"state": state, "digest": hash_tensors(sorted(tensors.items()), state)})


def read_header(path: Path, whole: bool = False) -> dict:
    """What a checkpoint says of itself; with ``whole``, once all of it is found to be what was written.

    Raises `InputError` when it is damaged, unreadable or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            header = json.loads(metadata.get("state", "{}"))
            if not isinstance(header, dict) or header.get("format") not in (FORMAT, WITHOUT_HASH):
                raise InputError(f"{path}: is not a checkpoint of this program's; take another one")
            if whole and header["format"] == FORMAT and metadata.get("digest") != hash_tensors(
                    ((name, file.get_tensor(name)) for name in sorted(file.keys())), metadata["state"]):
                raise InputError(f"{path}: is damaged, it is not what was written; take another checkpoint")
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); take another checkpoint") from None
    return header


def step_files(run: Path) -> list[Path]:
    """The checkpoints of a run, the earliest step first."""
    files = [path for path in (run / "checkpoints").glob("step-*.safetensors") if path.stem[5:].isdecimal()]
    return sorted(files, key=lambda path: int(path.stem[5:]))


def describe_unfinished(run: Path) -> str | None:
    """In words, how a run goes on that was stopped before its end; None where no checkpoint says that it was."""
    try:
        epochs = json.loads((run / ARGUMENTS).read_text("utf-8"))["n_epochs"]
        last = step_files(run)[-1]
        done, batches = (header := read_header(last))["iteration"], epochs * header["batches an epoch"]
    except (InputError, OSError, LookupError, TypeError, ValueError, RecursionError):
        return None
    if done >= batches:
        return None
    return (f"unfinished, after {done:,} of {batches:,} batches; go on with train.py --resume {run}, or take its last "
            f"checkpoint as it is: {last}")
