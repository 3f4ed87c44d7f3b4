"""Read what a training run leaves: curves, checkpoints, and the figures of its evaluation."""

import json
from pathlib import Path

import torch
from conftest import script
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event

from checkpoints import read_header, step_files


def events(run: Path) -> list[tuple[str, int, float | str]]:
    """Return (tag, step, number or text) of all that TensorBoard shows, parsed by the definition of its format."""
    data, place, found = next(run.glob("events.out.tfevents.*")).read_bytes(), 0, []
    while place < len(data):
        length = int.from_bytes(data[place:place + 8], "little")  # then a checksum of 4 bytes, event, checksum
        event = Event.FromString(data[place + 12:place + 12 + length])
        place += 16 + length
        for value in event.summary.value:
            text = value.tensor.string_val
            found.append((value.tag, event.step, text[0].decode() if text else value.simple_value))
    return found


def scalars(run: Path) -> dict[str, list[float]]:
    """Return the curves of a run's TensorBoard file."""
    curves: dict[str, list[float]] = {}
    for tag, _, value in events(run):
        curves.setdefault(tag, []).append(value)
    return curves


def evaluate(kind: str, run: Path, data: Path, cwd: Path, *more) -> tuple[float, list[dict]]:
    """Run convai_evaluation.py, and return the headline figure and the predictions."""
    out = script("convai_evaluation.py", "--eval_type", kind, "--model_checkpoint", run, "--dataset_path", data,
                 "--predictions", "predictions.jsonl", *more, cwd=cwd)
    headline = next(line for line in out.splitlines() if line.startswith("FINAL "))
    lines = (cwd / "predictions.jsonl").read_text().splitlines()
    return float(headline.rpartition(": ")[2]), [json.loads(line) for line in lines]


def assert_equal_tensors(path: Path, other: Path) -> None:
    tensors, others = load_file(path), load_file(other)
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in others)


def assert_equal_checkpoints(run: Path, expected: Path) -> None:
    """Compare the last checkpoints: weights, optimizer, schedule, random streams and validation."""
    last, theirs = step_files(run)[-1], step_files(expected)[-1]
    assert last.name == theirs.name and read_header(last) == read_header(theirs)
    assert_equal_tensors(last, theirs)
