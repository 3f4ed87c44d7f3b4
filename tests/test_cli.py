"""Test numbers on the command line: those in range are read, and all others are refused with the range."""

import math
import re
from argparse import ArgumentTypeError

import pytest
from conftest import error_line
from hypothesis import given
from hypothesis import strategies as st

import cli
from cli import InputError, Number

KINDS = [value for value in vars(cli).values() if isinstance(value, Number)]


@given(kind=st.sampled_from(KINDS), text=st.one_of(
    st.text(max_size=12), st.integers().map(str), st.floats().map(str), st.sampled_from(
        ["nan", "-nan", "inf", "-inf", "1e400", "-1e400", "9" * 5000, "0x10", "", "True", "1,5", "²", "\x1b[2J"])))
def test_numbers_are_in_range_or_refused(kind, text):
    try:
        value = kind(text)
    except ArgumentTypeError as error:
        assert str(error).endswith(f"is not {kind}") and str(error).isprintable() and len(str(error)) < 150
        return
    assert type(value) is kind.type and math.isfinite(value) and kind.least <= value <= kind.most and value in kind
    assert value == float(text)


@pytest.mark.parametrize("kind, inside, outside, words", [
    (cli.whole_number, [0, 2 ** 31 - 1], [-1, 2 ** 31, 1.0, True, "1", None],
     "a whole number from 0 to 2,147,483,647"),
    (cli.positive_number, [1], [0], "a whole number from 1 to 2,147,483,647"),
    (cli.share, [0, 0.5, 1.0], [-0.001, 1.001, math.nan, math.inf], "a number from 0 to 1"),
    (cli.fraction, [0.5, 1e-300], [0, 1, 0.0, 1.0], "a number between 0 and 1"),
    (cli.positive_real, [1e-300, 1e6], [0, -1, 1e7, -math.inf], "a number above 0 and up to 1,000,000"),
    (cli.port_number, [0, 65535], [-1, 65536], "a whole number from 0 to 65,535"),
    (Number(float, 0, 2, below_most=True), [0, 1.99], [2], "a number from 0 and below 2"),
])
def test_in_checks_values_of_any_type(kind, inside, outside, words):
    assert str(kind) == words
    assert [value in kind for value in [*inside, *outside]] == [True] * len(inside) + [False] * len(outside)


@pytest.mark.parametrize("script, flag, value, allowed", [
    *[("train.py", "--lr", value, "from 0 to") for value in ("nan", "-1", "inf", "1e7")],
    ("train.py", "--max_norm", "-1", "above 0"), ("train.py", "--max_norm", "0", "above 0"),
    ("train.py", "--lm_coef", "nan", "from 0 to"), ("train.py", "--mc_coef", "-0.5", "from 0 to"),
    ("train.py", "--warmup_ratio", "nan", "from 0 to 1"), ("train.py", "--train_frac", "nan", "between 0 and 1"),
    ("train.py", "--num_workers", "5000", "from 0 to 1,000"), ("train.py", "--seed", "9" * 30, "from 0 to"),
    ("train.py", "--local_rank", "nan", "from -1 to"),
    ("feedback/policy.py", "--gamma", "nan", "from 0 to 1"), ("feedback/policy.py", "--lam", "1.5", "from 0 to 1"),
    ("feedback/policy.py", "--clip", "inf", "above 0"), ("feedback/policy.py", "--beta", "0", "above 0"),
    ("feedback/policy.py", "--kl_coef", "nan", "from 0 to"), ("feedback/policy.py", "--kl_target", "-6", "from 0 to"),
    ("feedback/policy.py", "--unfinished_reward", "nan", "from -1,000,000 to"),
    ("feedback/policy.py", "--toxicity", "inf", "from -1,000,000 to"),
    ("feedback/reward.py", "--lr", "nan", "from 0 to"), ("feedback/reward.py", "--held_out", "nan", "from 0 to 1"),
    ("feedback/annotate.py", "--noise", "nan", "from 0 to 1"), ("feedback/annotate.py", "--port", "70000", "65,535"),
    ("models/tiny_corpus.py", "--topics", "15", "from 5 to 14"),
    ("models/tiny_corpus.py", "--values", "2", "from 3 to 10"), ("models/tiny_corpus.py", "--seed", "-1", "from 0 to"),
    ("example_entry.py", "--seed", "nan", "from 0 to"), ("demo.py", "--port", "-1", "from 0 to 65,535"),
])
def test_scripts_name_flag_and_range(tmp_path, script, flag, value, allowed):
    line = error_line(script, flag, value, cwd=tmp_path)
    assert f"argument {flag}" in line and f"{value[:20]!r} is not a" in line and allowed in line


@pytest.mark.parametrize("script", ["train.py", "interact.py", "convai_evaluation.py", "demo.py", "feedback/reward.py"])
def test_the_meta_device_is_refused(tmp_path, script):
    assert "--device: 'meta' cannot be used here" in error_line(script, "--device", "meta", cwd=tmp_path)


def test_too_little_memory_is_refused_with_figures(monkeypatch):
    monkeypatch.setattr(cli, "machine_memory", lambda: 8 * 2 ** 30)
    cli.require_memory(8 * 2 ** 30, "--batch_size 64")
    with pytest.raises(InputError, match="--batch_size 65 needs at least 12 GiB, and this machine has 8; give less"):
        cli.require_memory(12 * 2 ** 30, "--batch_size 65")


def test_flags_that_need_too_much_memory_are_refused(trained, small_corpus, tmp_path):
    """Ask for a petabyte: the scripts refuse before they decode or train anything, and leave nothing behind."""
    model = ["--model_checkpoint", trained, "--device", "cpu"]
    data = ["--dataset_path", small_corpus]
    for name, flag, value, more in [
        ("train.py", "--personality_permutations", 10 ** 9, data),
        ("feedback/policy.py", "--batch_size", 2 * 10 ** 9, [*data, "--utterance_metrics", 1]),
        ("feedback/collect.py", "--replies", 2 * 10 ** 9, [*data, "--contexts", 30]),
    ]:
        line = error_line(name, *model, *more, flag, value, cwd=tmp_path)
        assert re.search(rf"{flag} {value}( to 30 contexts a time)? needs at least [\d,]+ GiB, and this machine", line)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "pairs.jsonl").exists()
