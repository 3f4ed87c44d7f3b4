"""Write files completely or not at all, tensors with a hash that reveals damage, and checkpoints in such files.

This file knows bytes, tensors and names, but neither text nor networks nor training.
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
FORMAT_WITHOUT_HASH = "transfertransfo checkpoint 1"  # otherwise the same
# Files in a run folder:
ARGUMENTS = "training_args.json"
METRICS = "metrics.json"  # validation metrics, one object per epoch


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and move that file to ``path`` at the end of the block.

    After the block the file is safely on the disk. An error in the block leaves ``path`` as it was.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        sync(unfinished)  # so that a crash of the machine does not leave an empty file under the new name
        os.replace(unfinished, path)
        sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all. Raises ``OSError`` when it cannot be written."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, "utf-8")


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """Return the SHA-256 hash of a file's bytes, in hexadecimal. Raises ``OSError`` when it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_error(error: Exception, path: Path) -> OSError:
    """Convert the error of a library written in Rust to the ``OSError`` that Python would raise for a failed write."""
    number = re.search(r"os error (\d+)", str(error))
    code = int(number[1]) if number else errno.EIO
    return OSError(code, os.strerror(code) if number else str(error), str(path))


# ------------------------------------------------------------------------------------------------------ tensors


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file completely or not at all. Raises ``OSError`` when it cannot be written."""
    with replacing(path) as unfinished:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # as the umask sets it; the library would deny others to read the file
        try:
            save_file(dict(tensors), unfinished, metadata=metadata)
        except SafetensorError as error:
            raise disk_error(error, path) from None
        unfinished.chmod(mode)


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]], text: str = "") -> str:
    """Return a SHA-256 hash of ``text`` and of the tensors in their order: their names, types, shapes and values."""
    hashed = hashlib.sha256(text.encode())
    for name, tensor in tensors:
        hashed.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():  # an empty tensor cannot be viewed as bytes
            hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def distinct_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's parameters and persistent buffers by name; shared tensors only under their first name."""
    state, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            state[name] = tensor
            seen.add(id(tensor))
    return state


# -------------------------------------------------------------------------------------------------- checkpoints


def write_checkpoint(tensors: Mapping[str, torch.Tensor], path: Path, header: dict) -> None:
    """Write tensors, ``header`` as JSON, and a hash of both. Raises ``OSError`` like `write_tensors`."""
    state = json.dumps(header | {"format": FORMAT})
    write_tensors(tensors, path, {"state": state, "digest": hash_tensors(sorted(tensors.items()), state)})


def read_header(path: Path, verify: bool = False) -> dict:
    """Return the header of a checkpoint; with ``verify``, after checking the hash of its tensors.

    Raises `InputError` when the file is damaged, unreadable or not a checkpoint of this program.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            header = json.loads(metadata.get("state", "{}"))
            if not isinstance(header, dict) or header.get("format") not in (FORMAT, FORMAT_WITHOUT_HASH):
                raise InputError(f"{path}: is not a checkpoint of this program; name another file")
            if verify and header["format"] == FORMAT and metadata.get("digest") != hash_tensors(
                    ((name, file.get_tensor(name)) for name in sorted(file.keys())), metadata["state"]):
                raise InputError(f"{path}: is damaged, its hash differs; name another checkpoint")
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); name another checkpoint") from None
    return header


def step_files(run: Path) -> list[Path]:
    """List the checkpoints of a run in the order of their steps."""
    files = [path for path in (run / "checkpoints").glob("step-*.safetensors") if path.stem[5:].isdecimal()]
    return sorted(files, key=lambda path: int(path.stem[5:]))


def describe_unfinished(run: Path) -> str | None:
    """Describe how far an interrupted run got and how to resume it; return None for other runs."""
    try:
        epochs = json.loads((run / ARGUMENTS).read_text("utf-8"))["n_epochs"]
        last = step_files(run)[-1]
        done, batches = (header := read_header(last))["iteration"], epochs * header["batches an epoch"]
    except (InputError, OSError, LookupError, TypeError, ValueError, RecursionError):
        return None
    if done >= batches:
        return None
    return (f"unfinished, after {done:,} of {batches:,} batches; continue with train.py --resume {run}, or use its "
            f"last checkpoint as it is: {last}")
