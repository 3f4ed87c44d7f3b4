"""Run scripts in processes forked from a process that has already imported torch, which saves seconds per run.

Each process has its own working folder, environment, arguments and standard streams, as if a shell had started it.
"""

import io
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED = ["train", "convai_evaluation", "example_entry", "spacy.lang.en", "ftfy"]  # these import all slow modules
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.getenv("PYTHONPATH")]))
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(IMPORTED)


def start(path: Path, args: list[str], cwd: Path, env: dict[str, str],
          streams: list[Path]) -> multiprocessing.process.BaseProcess:
    """Start a script; ``streams`` are existing files for standard input, output and error."""
    process = _context.Process(target=_become, args=(path, args, cwd, env, streams))
    process.start()
    return process


def run(path: Path, args: list[str], cwd: Path, env: dict[str, str], streams: list[Path], timeout: float) -> int:
    """Start a script, wait for its end and return its exit status.

    Raises ``TimeoutError`` after ``timeout`` seconds, and kills the process.
    """
    process = start(path, args, cwd, env, streams)
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"{path.name} {' '.join(args)}: still running after {timeout} s; {streams[2].read_text()}")
    return process.exitcode


def _become(path: Path, args: list[str], cwd: Path, env: dict[str, str], streams: list[Path]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # multiprocessing's server ignores it
    for number, stream in enumerate(streams):
        file = os.open(stream, os.O_RDONLY if number == 0 else os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(open(number, "rb" if number == 0 else "wb"), "utf-8", line_buffering=number == 2)
        for number in range(3))
    sys.argv = [str(path), *args]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")
