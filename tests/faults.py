"""Kill a training run repeatedly, resume it, and compare it with a run that was never killed (`make faults`).

    python tests/faults.py [--signal KILL|TERM] [--times 20] [--folder .demo/faults]

A tiny model with dropout trains on the embedded sample with gradient accumulation, and writes a checkpoint every second
step. The process gets SIGKILL or SIGTERM at random moments; every third SIGKILL comes while a checkpoint is being
written. At the end, weights, optimizer and random streams must equal those of the undisturbed run bit by bit. If this
script is stopped and started again, it continues.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import warm
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from cli import positive_number  # noqa: E402

PATIENCE = 600  # seconds, enough for any step on a busy machine


def start(folder: Path, *args: str):
    """Start train.py in ``folder``, forked from a process that has imported torch; messages go to ``folder/log``."""
    log, nothing = folder / "log", Path(os.devnull)
    log.unlink(missing_ok=True)
    log.touch()
    return warm.start(ROOT / "train.py", [*args], folder, {**os.environ}, [nothing, nothing, log])


def end(process) -> int:
    process.join(PATIENCE)
    return process.exitcode if process.exitcode is not None else sys.exit(f"the process did not end in {PATIENCE} s")


def until(process, condition, *args) -> None:
    """Wait until ``condition(*args)`` holds or the process ends."""
    deadline = time.monotonic() + PATIENCE
    while process.is_alive() and not condition(*args):
        if time.monotonic() > deadline:
            sys.exit(f"nothing happened for {PATIENCE} s")
        time.sleep(0.0005)


def half_written(folder: Path) -> bool:
    return any(folder.glob("runs/*/checkpoints/*.unfinished"))


def contents(path: Path) -> dict:
    """Read everything in a checkpoint for a comparison: the bytes of each tensor, and the header."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}
        return tensors | {"": json.loads(file.metadata()["state"])}


def last_checkpoint(folder: Path) -> Path | None:
    files = folder.glob("runs/*/checkpoints/step-*.safetensors")
    return max(files, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem[5:])


def disturbed(folder: Path, name: str, times: int, arguments: list[str]) -> dict:
    """Train in ``folder`` with ``times`` signals, and return counts of what the signals interrupted."""
    note = folder / "progress.json"
    done = json.loads(note.read_text()) if note.exists() else {"signals": 0, "while writing": 0, "before any step": 0}
    rng = random.Random(f"{name} {done['signals']}")
    log = folder / "log"
    while True:
        before = last_checkpoint(folder)
        process = start(folder, *(["--resume", str(before.parents[1])] if before else arguments))
        if done["signals"] < times:
            until(process, lambda: b"loss=" in log.read_bytes())
            step = (step_of(before) if before else 0) + rng.randint(0, 6)
            until(process, lambda step=step: last_checkpoint(folder) and step_of(last_checkpoint(folder)) >= step)
            time.sleep(rng.uniform(0, 0.1))
            if name == "KILL" and done["signals"] % 3 == 0:  # writing takes milliseconds, so this may miss it
                step = step_of(last_checkpoint(folder))
                until(process, lambda step=step: half_written(folder) or step_of(last_checkpoint(folder)) > step + 8)
            if process.is_alive():
                os.kill(process.pid, signal.Signals[f"SIG{name}"])
        status = end(process)
        if status == 0:
            break
        if status != (-9 if name == "KILL" else 143):
            sys.exit(f"the run ended with status {status}; see {log}")
        done["signals"] += 1
        done["while writing"] += half_written(folder)
        done["before any step"] += last_checkpoint(folder) == before
        note.write_text(json.dumps(done))
        print(f"SIG{name} {done['signals']}: continues from {last_checkpoint(folder).stem}", flush=True)
    if done["signals"] < times:
        sys.exit(f"the run ended after {done['signals']} signals; lower --times")
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--signal", choices=["KILL", "TERM"], help="default: KILL, then TERM")
    parser.add_argument("--times", type=positive_number, default=20)
    parser.add_argument("--folder", type=Path, default=Path(".demo/faults"))
    args = parser.parse_args()
    folder = args.folder.resolve()
    model = folder / "model"
    shutil.copytree(ROOT / "models/tiny", model, dirs_exist_ok=True)
    config = json.loads((model / "config.json").read_text()) | {"n_layer": 1, "n_embd": 32}
    (model / "config.json").write_text(json.dumps(config))
    arguments = [f"--model_checkpoint={model}", f"--dataset_path={ROOT}/data/sample_personachat.json",
                 f"--dataset_cache={folder}/cache", "--n_epochs=1", "--personality_permutations=3", "--lr=1e-3",
                 "--train_batch_size=4", "--valid_batch_size=56", "--gradient_accumulation_steps=3",
                 "--checkpoint_every=2"]
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    (folder / "undisturbed").mkdir(exist_ok=True)
    if not (folder / "undisturbed" / "done").exists():
        shutil.rmtree(folder / "undisturbed" / "runs", ignore_errors=True)
        if end(start(folder / "undisturbed", *arguments)):
            sys.exit(f"the undisturbed run failed; see {folder}/undisturbed/log")
        (folder / "undisturbed" / "done").touch()
    expected = contents(last_checkpoint(folder / "undisturbed"))

    for name in [args.signal] if args.signal else ["KILL", "TERM"]:
        (folder / name).mkdir(exist_ok=True)
        done = disturbed(folder / name, name, args.times, arguments)
        found = contents(last_checkpoint(folder / name))
        different = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
        print(f"SIG{name}: {done['signals']} signals, of which {done['while writing']} left a half-written file and "
              f"{done['before any step']} came before the next checkpoint; step {expected['']['step']}: "
              + ("all equal bit by bit" if not different else f"DIFFERENT: {different}"))
        if different:
            sys.exit(1)


if __name__ == "__main__":
    main()
