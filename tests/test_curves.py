"""What a training leaves to look at."""

import json
import struct

import pytest
from conftest import SAMPLE, TINY, script
from tensorboardX.proto.event_pb2 import Event


def events(run) -> list[tuple[str, int, object]]:
    """(tag, step, number or text) of all that TensorBoard would show, read by the format's definition."""
    data, found = next(run.glob("events.out.tfevents.*")).read_bytes(), []
    while data:
        length = struct.unpack("<Q", data[:8])[0]  # then a checksum of 4 bytes, the event, and another checksum
        event = Event.FromString(data[12:12 + length])
        data = data[16 + length:]
        for value in event.summary.value:
            text = value.tensor.string_val[0].decode() if value.tensor.string_val else None
            found.append((value.tag, event.step, text if text is not None else value.simple_value))
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    work = tmp_path_factory.mktemp("curves")
    corpus = json.loads(SAMPLE.read_text("utf-8"))
    (work / "data.json").write_text(json.dumps({"train": corpus["train"][:3], "valid": corpus["valid"][:1]}))
    script("train.py", "--model_checkpoint", TINY, "--dataset_path", "data.json", "--n_epochs", 2, cwd=work)
    return next((work / "runs").iterdir())


def test_training_and_validation_share_an_axis_and_flags_and_replies_are_there(run):
    shown = events(run)
    losses = [step for tag, step, _ in shown if tag == "training/loss"]
    batches = len(losses) // 2
    assert losses == list(range(1, 2 * batches + 1))
    for tag in ("validation/ppl", "validation/hits_1", "replies/text_summary"):
        assert [step for name, step, _ in shown if name == tag] == [batches, 2 * batches], tag
    flags = next(text for tag, _, text in shown if tag == "flags/text_summary")
    assert "| n_epochs | 2 |" in flags and "| lm_coef | 1.0 |" in flags
    replies = [text for tag, _, text in shown if tag == "replies/text_summary"]
    corpus = json.loads(SAMPLE.read_text("utf-8"))["valid"][0]
    first = corpus["utterances"][0]["history"][-1]
    assert all(text.count("> ") == 3 and text.startswith(f"> {first[:5]}") for text in replies)


def test_metrics_json_has_the_validation_of_each_epoch(run):
    rows = json.loads((run / "metrics.json").read_text())
    shown = events(run)
    assert [row["epoch"] for row in rows] == [1, 2]
    for name in ("hits@1", "nll", "ppl"):
        of_curve = [value for tag, _, value in shown if tag == f"validation/{name.replace(chr(64), chr(95))}"]
        assert [row[name] for row in rows] == pytest.approx(of_curve, rel=1e-6)
    resumed = sorted((run / "checkpoints").iterdir())[0]  # goes on after the first epoch, and measures the same again
    script("train.py", "--resume", resumed, cwd=run.parents[1])
    assert json.loads((run / "metrics.json").read_text()) == rows
