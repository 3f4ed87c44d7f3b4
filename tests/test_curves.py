"""Test the curves, texts and metrics that a training run leaves."""

import json

import pytest
from conftest import SAMPLE, TINY, first_dialogs, script, the_run
from run_folder import events


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    work = tmp_path_factory.mktemp("curves")
    first_dialogs(SAMPLE, work / "data.json", 3)
    script("train.py", "--model_checkpoint", TINY, "--dataset_path", "data.json", "--n_epochs", 2, cwd=work)
    return the_run(work)


def test_curves_share_steps_and_show_flags_and_replies(run):
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
    resumed = sorted((run / "checkpoints").iterdir())[0]  # resumes after the first epoch, and validates again
    script("train.py", "--resume", resumed, cwd=run.parents[1])
    assert json.loads((run / "metrics.json").read_text()) == rows
