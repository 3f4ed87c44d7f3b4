"""Test that interrupted runs resume to exactly the same result, whatever stopped or damaged them."""

import ctypes
import itertools
import json
import logging
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import warm
from conftest import ROOT, Evil, error_line, first_dialogs, make_checkpoint, run_main, script, templates, the_run
from run_folder import assert_equal_checkpoints, assert_equal_tensors, scalars
from safetensors.torch import load_file, save_file
from test_distributed import PATIENCE, until
from transformers import GPT2Config

import devices
import train
from checkpoints import Checkpoints, find_checkpoint, read_header, step_files
from cli import InputError
from schedule import AdamW, Decay
from utils import get_dataset, make_logdir
from weights import load_model


def files_of(run: Path) -> list[str]:
    return [path.name for path in step_files(run)]


def assert_equal_runs(run: Path, expected: Path) -> None:
    """Compare the last checkpoints and the final models."""
    assert_equal_checkpoints(run, expected)
    assert_equal_tensors(run / "model.safetensors", expected / "model.safetensors")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, small_corpus) -> list:
    """Return arguments for two epochs of eight batches with dropout; with three per step, epochs end within a step."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("dropout") / "model", n_layer=1, n_embd=32)
    return ["--dataset_path", small_corpus, "--model_checkpoint", checkpoint, "--n_epochs", 2, "--lr", 1e-3,
            "--train_batch_size", 8, "--gradient_accumulation_steps", 3, "--checkpoint_every", 1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, arguments) -> Path:
    work = tmp_path_factory.mktemp("undisturbed")
    script("train.py", *arguments, "--keep_checkpoints", 99, cwd=work)
    return the_run(work)


@contextmanager
def started(*args, cwd: Path):
    """Run train.py in the background, to be disturbed, and kill it at the end."""
    log = cwd / "log"
    log.touch()
    process = warm.start(ROOT / "train.py", list(map(str, args)), cwd, dict(os.environ),
                         [Path(os.devnull), Path(os.devnull), log])
    try:
        yield process
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_resumes_to_the_same_weights(number, status, arguments, undisturbed, tmp_path):
    with started(*arguments, cwd=tmp_path) as process:
        until(lambda: list(tmp_path.glob("runs/*/checkpoints/step-*.safetensors")), [process])
        os.kill(process.pid, number)
        process.join(PATIENCE)
        assert process.exitcode == status
    said, run = (tmp_path / "log").read_text(), the_run(tmp_path)
    assert "Traceback" not in said and ("--resume" in said) == (number != signal.SIGKILL)
    script("train.py", "--resume", run, cwd=tmp_path)
    assert_equal_runs(run, undisturbed)
    script("train.py", "--resume", run, cwd=tmp_path)  # nothing is left to do
    assert "The run is in" in script.stderr and "Epoch" not in script.stderr


def copied_at(checkpoint: Path, work: Path) -> Path:
    """Copy a run in the state that it had at one of its checkpoints."""
    run = work / "runs" / "copy"
    (run / "checkpoints").mkdir(parents=True)
    for path in checkpoint.parents[1].iterdir():
        if path.is_file() and not path.name.startswith(("model", "events")):
            shutil.copy(path, run)
    for path in step_files(checkpoint.parents[1]):
        if int(path.stem[5:]) <= int(checkpoint.stem[5:]):
            shutil.copy(path, run / "checkpoints")
    return run


@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_every_checkpoint_resumes_to_the_same_end(place, undisturbed, tmp_path):
    """Resume from several checkpoints. The first epoch ends within a step, so resuming validates that epoch again."""
    run = copied_at(step_files(undisturbed)[place], tmp_path)
    script("train.py", "--resume", run, cwd=tmp_path)
    assert_equal_runs(run, undisturbed)
    assert files_of(run) == files_of(undisturbed) == [f"step-{step}.safetensors" for step in range(1, 7)]


def test_headers_hold_the_position(undisturbed):
    headers = [read_header(path) for path in step_files(undisturbed)]
    assert [header["iteration"] for header in headers] == [3, 6, 9, 12, 15, 16]
    validated = [header["nll"] for header in headers if header["nll"]]
    assert validated == pytest.approx(scalars(undisturbed)["validation/nll"], rel=1e-6)
    assert [header["schedule"]["event_index"] for header in headers] == [3, 6, 9, 12, 15, 16]


def test_the_last_and_the_best_checkpoints_are_kept(arguments, small_corpus, tmp_path):
    """Train at a rate that rises until training diverges: an early epoch validates best, and its checkpoint stays."""
    script("train.py", *arguments, "--n_epochs", 4, "--lr", 10, "--warmup_ratio", 0.95, "--gradient_accumulation_steps",
           1, "--checkpoint_every", 3, "--keep_checkpoints", 2, cwd=tmp_path)
    nll = scalars(the_run(tmp_path))["validation/nll"]
    best = 8 * (1 + nll.index(min(nll)))
    assert files_of(the_run(tmp_path)) == [f"step-{step}.safetensors" for step in sorted({best, 30, 32})]
    assert best < 30


def test_damaged_and_foreign_checkpoints_are_skipped(undisturbed, tmp_path):
    run = copied_at(step_files(undisturbed)[4], tmp_path)
    whole = (run / "checkpoints" / "step-5.safetensors").read_bytes()
    (run / "checkpoints" / "step-5.safetensors").write_bytes(whole[:-1000])
    (run / "checkpoints" / "step-6.safetensors").write_bytes(pickle.dumps(Evil(tmp_path / "proof")))
    (run / "checkpoints" / "step-7.safetensors").write_bytes(b"")
    (run / "checkpoints" / "step-6.safetensors.99.unfinished").write_bytes(whole[:1000])
    script("train.py", "--resume", run, "--keep_checkpoints", 99, cwd=tmp_path)
    assert script.stderr.count("trying the one before") == 3 and "Continuing after step 4" in script.stderr
    assert not (tmp_path / "proof").exists() and not list(run.rglob("*.unfinished"))
    (run / "checkpoints" / "step-7.safetensors").unlink()
    assert_equal_runs(run, undisturbed)


def test_runs_that_cannot_be_resumed_are_refused(undisturbed, small_corpus, tmp_path):
    def refused(*args, env=None) -> str:
        return error_line("train.py", "--resume", *args, cwd=tmp_path, env=env)

    run = copied_at(step_files(undisturbed)[0], tmp_path)
    assert "is not a run folder" in refused(tmp_path / "nowhere")
    assert "--lr 0.5: the run began with 0.001" in refused(run, "--lr", 0.5)
    other = json.loads(small_corpus.read_text())
    other["train"].pop()
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert "its data was" in refused(run, "--dataset_path", tmp_path / "other.json")
    wider = make_checkpoint(tmp_path / "wider", n_layer=1, n_embd=64)
    assert "is not a checkpoint of this run's model" in refused(run, "--model_checkpoint", wider)
    with started("--resume", run, cwd=tmp_path) as process:  # a second process on the same run is refused
        until(lambda: "Continuing after" in (tmp_path / "log").read_text(), [process])
        os.kill(process.pid, signal.SIGSTOP)
        assert "another process is training this run" in refused(run)
    (run / "training_args.json").write_text("[1")
    assert "training_args.json: cannot be read" in refused(run)
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint" in refused(run)


@contextmanager
def nobody():
    """Become the user nobody, to whom the tests' files are closed; root keeps the right to change back."""
    if os.geteuid():
        pytest.skip("needs root to become the user nobody")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_missing_permissions_are_named(undisturbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o700)
    with nobody(), pytest.raises(InputError, match="cannot be read .Permission denied."):
        find_checkpoint(str(undisturbed))
    with nobody(), pytest.raises(InputError, match="cannot be made .Permission denied."):
        make_logdir("model")


@contextmanager
def small_disk(folder: Path, size: str):
    """Mount a file system of this size at ``folder``."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_costs_only_checkpoints(arguments, undisturbed, tmp_path):
    """Leave room for the tokenizer and one checkpoint; given more room, the run resumes from that checkpoint."""
    with small_disk(tmp_path / "runs", "1000k"):
        script("train.py", *arguments, cwd=tmp_path, status=2)
        run = the_run(tmp_path)
        assert script.stderr.count("cannot be written (") == 2 == script.stderr.count("No space left on device")
        assert re.search(r"step-2.safetensors cannot .*, step-1.safetensors is kept", script.stderr)
        assert "Epoch [2/2]: [8/8]" in script.stderr  # training reached its end
        assert "training is complete, but the weights could not be written; make room" in script.stderr
        assert files_of(run) == ["step-1.safetensors"] and not list(run.rglob("*.unfinished"))
        subprocess.run(["mount", "-o", "remount,size=50m", tmp_path / "runs"], check=True)
        script("train.py", "--resume", run, cwd=tmp_path)
        assert_equal_runs(run, undisturbed)


@pytest.mark.parametrize("size", [8, 16, 24, 40, 64, 104])
def test_a_full_disk_at_the_start_is_one_error_line(size, arguments, tmp_path):
    """Vary which file finds no room: one of the tokenizer's files, the arguments or the curves."""
    with small_disk(tmp_path / "runs", f"{size}k"):
        line = error_line("train.py", *arguments, cwd=tmp_path)
        assert "No space left on device" in script.stderr and "make room" in line
        assert not list(tmp_path.rglob("*.unfinished"))


def test_a_clock_that_jumps_changes_nothing(arguments, undisturbed, tmp_path, monkeypatch):
    """Shift each reading of the clock by up to a year; checkpoints are ordered by step, whatever their dates."""
    monkeypatch.chdir(tmp_path)
    year, looks, now = 365 * 24 * 3600, itertools.count(), time.time
    monkeypatch.setattr(time, "time", lambda: now() + (next(looks) % 3 - 1) * year)
    run_main(monkeypatch, train.main, *arguments, "--keep_checkpoints", 99)
    run = the_run(tmp_path)
    for path in step_files(run):
        os.utime(path, (0, 4_000_000_000 - int(path.stem[5:])))
    (run / "checkpoints" / "step-6.safetensors").unlink()
    run_main(monkeypatch, train.main, "--resume", run)
    assert_equal_tensors(step_files(run)[-1], step_files(undisturbed)[-1])
    assert files_of(run) == files_of(undisturbed)


def test_the_used_gpus_generator_is_saved(tmp_path, monkeypatch):
    """Save only the generator of ``--device cuda:1``. The GPUs are simulated, because this machine may lack them."""
    states = {"cuda:0": 10, "cuda:1": 11}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state",
                        lambda device="cuda:0": torch.tensor([states[str(device)]], dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state",
                        lambda state, device="cuda:0": states.update({str(device): int(state)}))
    model = torch.nn.Linear(1, 1)
    model.config = GPT2Config()
    optimizer = AdamW(model.parameters(), 0.1)
    args = Namespace(device="cuda:1", keep_checkpoints=1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    checkpoints = Checkpoints(tmp_path, model, optimizer, scaler, Decay(optimizer, 9, 0.1), args)
    checkpoints.facts = {}
    checkpoints.mark(step=3, iteration=6)
    checkpoints.save()
    states.update({"cuda:0": 20, "cuda:1": 21})
    checkpoints.restore(step_files(tmp_path)[0])
    assert states == {"cuda:0": 20, "cuda:1": 11}


def test_parallel_processes_build_a_table_once(tokenizer, small_corpus, tmp_path):
    """Start four processes at the same moment: one writes the table, the others read it."""
    tokenizer("in one process first")
    gate, opened = os.pipe()
    children = []
    for number in range(4):
        if not (child := os.fork()):
            os.close(opened)
            os.read(gate, 1)  # wait until all have started
            messages = logging.FileHandler(tmp_path / f"log-{number}")
            logging.getLogger("utils").addHandler(messages)
            logging.getLogger("utils").setLevel(logging.INFO)
            try:
                table = get_dataset(tokenizer, str(small_corpus), str(tmp_path / "cache"))
                (tmp_path / f"found-{number}").write_text(json.dumps([table["train"][0], table["valid"][3]]))
            finally:
                os._exit(0)
        children.append(child)
    os.close(opened)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    logs = "".join((tmp_path / f"log-{number}").read_text() for number in range(4))
    assert logs.count("Tokenising") == 1 and logs.count("Token table read") == 3
    found = {(tmp_path / f"found-{number}").read_text() for number in range(4)}
    alone = get_dataset(tokenizer, str(small_corpus), str(tmp_path / "alone"))
    assert found == {json.dumps([alone["train"][0], alone["valid"][3]])}
    assert len(list(tmp_path.glob("cache*.safetensors"))) == 1 and not list(tmp_path.glob("*.unfinished"))


def test_an_infinite_loss_names_the_turns(tmp_path):
    """Train at an absurd learning rate: the error names the batch's turns, and the last checkpoint is still finite."""
    corpus = json.loads(templates().read_text("utf-8"))
    first_dialogs(templates(), tmp_path / "few.json", 3)
    turns = [f"train[{dialog}].utterances[{turn}]" for dialog, entry in enumerate(corpus["train"][:3])
             for turn in range(len(entry["utterances"]))]
    checkpoint = make_checkpoint(tmp_path / "model", n_layer=1, n_embd=32)
    line = error_line("train.py", "--dataset_path", "few.json", "--model_checkpoint", checkpoint, "--lr", 1e6,
                      "--n_epochs", 30, "--train_batch_size", 99, "--gradient_accumulation_steps", 1, cwd=tmp_path)
    step = int(re.search(r"(?:nan|inf) in step (\d+), on ", line)[1])
    assert sorted(re.findall(r"train\[\d+\]\.utterances\[\d+\]", line)) == sorted(turns)
    assert files_of(the_run(tmp_path))[-1] == f"step-{step - 1}.safetensors" and f"step-{step - 1}" in line
    last = load_file(step_files(the_run(tmp_path))[-1])
    assert all(tensor.isfinite().all() for tensor in last.values())


def test_running_out_of_memory_says_what_to_lower(small_corpus, tmp_path, monkeypatch):
    """Allow 500 MB more than the process uses; 57 turns of 100 tokens through 40,000 inner units need 900 MB."""
    monkeypatch.chdir(tmp_path)
    checkpoint = make_checkpoint(tmp_path / "wide", model_type="gpt2", vocab_size=1152, n_layer=1, n_embd=32,
                                 n_inner=40_000)
    data = ["--dataset_path", small_corpus, "--model_checkpoint", checkpoint]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20, limits[1]))
    try:
        with pytest.raises(InputError) as training:
            run_main(monkeypatch, train.main, *data, "--train_batch_size", 57, "--gradient_accumulation_steps", 3)
        with pytest.raises(InputError) as validating:
            run_main(monkeypatch, train.main, *data, "--n_epochs", 0, "--valid_batch_size", 17)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert re.search("out of memory on a batch of 57 turns, .*--train_batch_size 29 --gradient_accumulation_steps 6",
                     str(training.value))
    assert re.search("out of memory on a batch of 17 turns, .*--valid_batch_size 8", str(validating.value))


# ------------------------------------------------------------------------------------------- damage, kills and mistakes


def test_a_flipped_bit_is_detected(undisturbed, tmp_path):
    """Flip bits anywhere: in the weights, the optimizer's moments, the header and the hash itself."""
    whole = step_files(undisturbed)[1].read_bytes()
    header, path = 8 + int.from_bytes(whole[:8], "little"), tmp_path / "runs" / "checkpoints" / "step-2.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(whole)
    read_header(path, verify=True)
    rng = random.Random(0)
    for place in [*rng.sample(range(header), 150), *rng.sample(range(header, len(whole)), 50), len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1:])
        with pytest.raises(InputError, match="another"):
            read_header(path, verify=True)


def test_a_checkpoint_with_a_changed_weight_is_skipped(undisturbed, tmp_path):
    run = copied_at(step_files(undisturbed)[3], tmp_path)
    last = step_files(run)[-1]
    with open(last, "r+b") as file:
        file.seek(-7, os.SEEK_END)
        byte = file.read(1)
        file.seek(-7, os.SEEK_END)
        file.write(bytes([byte[0] ^ 4]))
    assert f"{last.name}: is damaged" in error_line("train.py", "--resume", last, cwd=tmp_path)
    assert f"{last}: is damaged" in error_line("interact.py", "--model_checkpoint", last, cwd=tmp_path)
    script("train.py", "--resume", run, "--keep_checkpoints", 99, cwd=tmp_path)
    assert f"{last.name}: is damaged, its hash differs" in script.stderr
    assert "Continuing after step 3" in script.stderr
    assert_equal_runs(run, undisturbed)


def test_a_checkpoint_without_a_hash_resumes(undisturbed, tmp_path):
    run = copied_at(step_files(undisturbed)[3], tmp_path)
    last = step_files(run)[-1]
    header = read_header(last)
    del header["config"]
    save_file(load_file(last), last, {"state": json.dumps(header | {"format": "transfertransfo checkpoint 1"})})
    assert "does not describe its model" in error_line("interact.py", "--model_checkpoint", last, cwd=tmp_path)
    script("train.py", "--resume", run, "--keep_checkpoints", 99, cwd=tmp_path)
    assert "Continuing after step 4" in script.stderr
    assert_equal_tensors(run / "model.safetensors", undisturbed / "model.safetensors")


def test_an_unfinished_run_is_reported(undisturbed, small_corpus, tmp_path):
    """Use runs killed in the first epoch (without a model) and in the second (with a model), and a finished run."""
    run = copied_at(step_files(undisturbed)[1], tmp_path)
    last = step_files(run)[-1]
    (run / "config.json").unlink()
    data = ["--dataset_path", small_corpus, "--device", "cpu"]
    for name, more in [("interact.py", []), ("convai_evaluation.py", []), ("demo.py", ["--port", "0"])]:
        line = error_line(name, "--model_checkpoint", run, *data, *more, cwd=tmp_path)
        assert "has no model yet, this run is unfinished, after 6 of 16 batches; continue with train.py" in line
        assert f"--resume {run}, or" in line and str(last) in line
    first_epoch = load_model(str(last))
    said = script("interact.py", "--model_checkpoint", last, *data, "--no_sample", stdin="hello !\n", cwd=tmp_path)
    assert said.startswith("Personality:") and "unfinished" not in script.stderr

    (run / "config.json").write_bytes((undisturbed / "config.json").read_bytes())
    (run / "model.safetensors").write_bytes((undisturbed / "model.safetensors").read_bytes())
    script("convai_evaluation.py", "--model_checkpoint", run, *data, cwd=tmp_path)
    assert script.stderr.count("the run is unfinished, after 6 of 16 batches; continue with train.py --resume") == 1
    script("convai_evaluation.py", "--model_checkpoint", undisturbed, *data, cwd=tmp_path)
    assert "unfinished" not in script.stderr

    stored = load_file(last)
    assert all(torch.equal(tensor, stored[f"model.{name}"]) for name, tensor in first_epoch.state_dict().items()
               if f"model.{name}" in stored)
    for name, tensor in load_model(str(step_files(undisturbed)[-1])).state_dict().items():
        assert torch.equal(tensor, load_model(str(undisturbed)).state_dict()[name]), name
    shutil.rmtree(run / "checkpoints")
    (run / "config.json").unlink()
    line = error_line("interact.py", "--model_checkpoint", run, *data, cwd=tmp_path)
    assert "this run is stopped before its first checkpoint; train anew" in line


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc keeps freed memory")
def test_freed_memory_is_returned():
    """Free 300 MB in pieces, but keep every hundredth: glibc holds the memory until eight batches have run."""
    def used() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20

    pieces = [b"x" * 100_000 for _ in range(3000)]
    for place in range(len(pieces)):
        if place % 100:
            pieces[place] = None
    before, steps = used(), devices.within_memory(lambda engine, batch: batch, Namespace())
    for iteration in range(1, 9):
        assert steps(Namespace(state=Namespace(iteration=iteration)), "batch") == "batch"
    assert used() < before - 200


GROWING = """
import ctypes
import sys
import layers
import packing
import torch
torch.set_num_threads(1)
class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c d e f used free g".split()]
heap = ctypes.CDLL(None).mallinfo2
heap.restype = Heap
dtype, work = getattr(torch, sys.argv[1]), sys.argv[2]
layers.ONEDNN = True
several = torch.nn.ModuleList(torch.nn.Linear(576, width, dtype=dtype) for width in (192, 576, 1536))
layers.quicken_(several)
if work == "decoding":
    several = [packing.packed([layer]) for layer in several]
for rows in range(20, 600, 10):
    for layer in several:
        out = layer(torch.ones(rows, 576, dtype=dtype, requires_grad=work == "training"))
        if work == "training":
            out.sum().backward()
    if rows == 300:
        before = heap().used
print(heap().used - before >> 20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc reports the size of its heap")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("work", ["training", "decoding"])
def test_little_is_cached_per_shape(dtype, work):
    """Measure what 29 more lengths leave in the heap: 50 to 150 MiB with oneDNN's own limits."""
    done = subprocess.run([sys.executable, "-c", GROWING, dtype, work], capture_output=True, text=True, check=True,
                          cwd=ROOT)
    assert int(done.stdout) < 10
