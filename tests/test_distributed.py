"""Test that several processes train as one does: the same batches, losses, weights and validation."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import NO_DROPOUT, ROOT, make_checkpoint, script, the_run
from hypothesis import given
from hypothesis import strategies as st
from run_folder import assert_equal_checkpoints, scalars
from safetensors.torch import load_file

from checkpoints import read_header, step_files
from inputs import LengthBatches

PATIENCE = 300  # seconds, enough for any step on a busy machine


def store_at(ports) -> torch.distributed.TCPStore:
    """Open the store where processes find each other, as torchrun does, at the first free port; 0 is any free port."""
    for port in ports:
        try:
            return torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        except RuntimeError:
            continue
    raise AssertionError("no port is free")


@contextmanager
def processes(count: int, *args, cwd: Path, env: dict | None = None, ports=(0,)):
    """Run train.py in ``count`` processes; ``env`` may contain {rank}, and {job}, which determines Slurm's port."""
    store = store_at(ports)
    env = env or {"RANK": "{rank}", "LOCAL_RANK": "{rank}", "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": store.port}
    env = env | {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    started = []
    for rank in range(count):
        log = cwd / f"log-{rank}"
        log.touch()
        own = {name: str(value).format(rank=rank, job=store.port - 15000) for name, value in env.items()}
        started.append(warm.start(ROOT / "train.py", list(map(str, args)), cwd, {**os.environ, **own},
                                  [Path(os.devnull), Path(os.devnull), log]))
    try:
        yield started
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
            process.join()


def ended(started: list) -> list[int]:
    """Wait for all processes, and return their exit statuses."""
    for process in started:
        process.join(PATIENCE)
    return [process.exitcode for process in started]


def until(condition, started: list) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline and all(process.is_alive() for process in started):
        time.sleep(0.01)
    assert condition()


def said(cwd: Path, rank: int) -> str:
    text = (cwd / f"log-{rank}").read_text()
    assert "Traceback" not in text, text
    return text


@pytest.fixture(scope="module")
def still(tmp_path_factory, small_corpus) -> list:
    """Return arguments for 52 steps of two batches: 57 training turns, 17 validation turns, no dropout."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("still") / "model", n_layer=1, n_embd=32, **NO_DROPOUT)
    return ["--dataset_path", small_corpus, "--model_checkpoint", checkpoint, "--n_epochs", 13, "--lr", 1e-4,
            "--gradient_accumulation_steps", 2, "--keep_checkpoints", 99]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, still) -> Path:
    work = tmp_path_factory.mktemp("one")
    script("train.py", *still, "--train_batch_size", 8, cwd=work)
    return the_run(work)


def assert_same_run(run: Path, expected: Path) -> None:
    """Compare the losses of all batches and the final weights within 1e-5, and each validation within 1e-6."""
    curves, theirs = scalars(run), scalars(expected)
    for name in ("training/loss", "training/lm_loss", "training/mc_loss"):
        assert curves[name] == pytest.approx(theirs[name], abs=1e-5)
    assert curves["validation/hits_1"] == theirs["validation/hits_1"]
    validated, truth = ([read_header(path)["nll"] for path in step_files(one)] for one in (run, expected))
    assert validated == pytest.approx(truth, abs=1e-6) and len(truth) == 13
    assert_same_weights(run, expected)


def assert_same_weights(run: Path, expected: Path, within: float = 1e-5) -> None:
    weights, theirs = load_file(run / "model.safetensors"), load_file(expected / "model.safetensors")
    assert weights.keys() == theirs.keys()
    for name in weights:
        assert (weights[name] - theirs[name]).abs().max() < within, name


@pytest.mark.long
def test_the_published_command_with_eight_processes(still, tmp_path):
    """Run the published command on our data and model: two steps of four global batches of sixteen turns."""
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    (tmp_path / "one").mkdir()
    own = ["--dataset_path", str(still[1]), "--model_checkpoint", str(still[3])]
    recipe = ["--gradient_accumulation_steps=4", "--lm_coef=2.0", "--max_history=2", "--n_epochs=1",
              "--num_candidates=4", "--personality_permutations=2", "--train_batch_size=2", "--valid_batch_size=2"]
    free = store_at([0]).port  # this store closes before the launcher opens its own
    launcher = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=8"]
    done = subprocess.run([*launcher, "./train.py", *recipe, *own], cwd=tmp_path, capture_output=True, text=True,
                          timeout=2 * PATIENCE, env={**os.environ, "PET_MASTER_PORT": str(free)})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("The run is in") == 1
    script("train.py", *recipe, "--train_batch_size=16", *own, cwd=tmp_path / "one")
    run, expected = (the_run(folder) for folder in (tmp_path, tmp_path / "one"))
    curves, theirs = scalars(run), scalars(expected)
    assert len(theirs["training/loss"]) == 8 and len(step_files(expected)) == 1
    for name in ("training/loss", "training/lm_loss", "training/mc_loss"):
        assert curves[name] == pytest.approx(theirs[name], abs=1e-5)
    assert curves["validation/nll"] == pytest.approx(theirs["validation/nll"], abs=1e-6)
    assert curves["validation/hits_1"] == theirs["validation/hits_1"]
    assert_same_weights(run, expected, within=1e-6)


def test_four_processes_train_as_one(still, one_process, tmp_path):
    """Leave some processes without turns: an epoch's last batch has one turn, and validation batches have 16 and 1.

    Training also moves the weights much more than the two runs may differ.
    """
    first, *_, last = step_files(one_process)
    first, last = load_file(first), load_file(last)
    assert max((first[name] - last[name]).abs().max() for name in first if name.startswith("model.")) > 1e-3
    with processes(4, *still, "--train_batch_size", 2, cwd=tmp_path) as started:
        assert ended(started) == [0] * 4, [said(tmp_path, rank) for rank in range(4)]
    assert [bool(said(tmp_path, rank)) for rank in range(4)] == [True, False, False, False]  # only one process logs
    assert_same_run(the_run(tmp_path), one_process)


def test_sharded_weights_under_slurm(still, one_process, tmp_path):
    """Run two of srun's tasks, each with a part of every weight; the run folder is an ordinary one."""
    slurm = {"SLURM_JOB_ID": "12{job:04}", "SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}", "SLURM_NTASKS": 2,
             "SLURM_STEP_NUM_TASKS": 2, "SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_JOB_NUM_NODES": 1}
    ports = random.sample(range(15000, 25000), 100)  # ignite computes the port from the job's number
    with processes(2, *still, "--train_batch_size", 4, "--shard", cwd=tmp_path, env=slurm, ports=ports) as started:
        assert ended(started) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    assert_same_run(the_run(tmp_path), one_process)


def test_fewer_processes_resume_after_a_loss(still, one_process, tmp_path):
    with processes(2, *still, "--train_batch_size", 4, "--checkpoint_every", 1, cwd=tmp_path) as started:
        until(lambda: len(list(tmp_path.glob("runs/*/checkpoints/step-*.safetensors"))) > 5, started)
        started[1].kill()
        assert ended(started) == [2, -signal.SIGKILL]
    assert "error: another process of this run was lost" in said(tmp_path, 0)
    run = the_run(tmp_path)
    script("train.py", "--resume", run, cwd=tmp_path)
    assert_same_weights(run, one_process)


def test_a_signal_to_one_process_stops_all(small_corpus, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model", n_layer=1, n_embd=32)
    args = ["--dataset_path", small_corpus, "--model_checkpoint", checkpoint, "--n_epochs", 2, "--lr", 1e-3,
            "--train_batch_size", 2, "--gradient_accumulation_steps", 3, "--checkpoint_every", 1]
    for name in ("undisturbed", "stopped"):
        (tmp_path / name).mkdir()
    with processes(2, *args, cwd=tmp_path / "undisturbed") as started:
        assert ended(started) == [0, 0]
    work = tmp_path / "stopped"
    with processes(2, *args, cwd=work) as started:
        until(lambda: list(work.glob("runs/*/checkpoints/step-*.safetensors")), started)
        os.kill(started[1].pid, signal.SIGTERM)
        assert ended(started) == [143, 143]
    run = the_run(work)
    assert "Stopped after step" in said(work, 0) and said(work, 1) == ""
    with processes(2, "--resume", run, cwd=work) as started:
        assert ended(started) == [0, 0]
    assert_equal_checkpoints(run, the_run(tmp_path / "undisturbed"))


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 9), st.sampled_from([None, 5]), st.integers(0, 3))
def test_processes_share_the_batches_of_one(turns, world, batch_size, seed, start):
    lengths = np.arange(turns) % 5
    one = LengthBatches(lengths, batch_size, seed)
    one.set_epoch(3)
    batches = [batch.tolist() for batch in one]
    assert sorted(sum(batches, [])) == list(range(turns))
    shares = []
    for rank in range(world):
        sampler = LengthBatches(lengths, batch_size, seed, rank=rank, world=world)
        sampler.set_epoch(3, start=start)
        shares.append([share.tolist() for share in sampler])
    together = [sorted(sum(parts, [])) for parts in zip(*shares, strict=True)]
    assert together == [sorted(batch) for batch in batches[start:]]
    assert all(max(map(len, parts)) - min(map(len, parts)) <= 1 for parts in zip(*shares, strict=True))
