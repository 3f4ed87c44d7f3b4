"""Shared parts of all command lines: one-line errors, safe output, number types for flags, and a check of memory.

This file imports only the standard library, so that a script can refuse a flag before it loads anything large.
"""

import errno
import io
import logging
import math
import os
import signal
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST_NUMBER = 2 ** 31 - 1  # numpy takes seeds up to 2 ** 32 - 1


class InputError(Exception):
    """An error that the user can correct. The message is one line that names the thing, the place and the cure."""


def say_start() -> None:
    """Print in a terminal that the script has started, and let Ctrl-C end it without a traceback.

    Call this before imports that take seconds; `command` replaces this handling of Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # background jobs of a shell ignore Ctrl-C
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    if sys.stdin.isatty() and sys.stdout.isatty() and not {"-h", "--help"} & {*sys.argv}:
        print("Loading the model …", flush=True)


def command(main: Callable[[], Any]) -> None:
    """Run a script's ``main`` and exit with its status.

    An `InputError` and an unusable file end the script with one line on standard error and status 2. As with the
    shell's own commands, Ctrl-C gives status 130 and a closed output pipe 141. Error messages and log records are
    stripped of control characters, which a terminal might obey; a character that the terminal cannot show becomes "?".
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_printable_record)
    try:
        sys.exit(main())
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the program that read our output has ended, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the interpreter complains at exit
        sys.exit(141)
    except OSError as error:
        if not error.filename and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            print(f"{Path(sys.argv[0]).name}: error: a file cannot be written ({error.strerror}); make room on the "
                  "disk, or start in a folder on another one", file=sys.stderr)

            sys.exit(2)
        if not error.filename:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {printable(str(error.filename))}: cannot be used ({error.strerror}); "
              "name a file or folder that you may read and write", file=sys.stderr)
        sys.exit(2)


def printable(text: str) -> str:
    """Replace every character that a terminal might obey by a space: escapes, line breaks, changes of direction."""
    return text if text.isprintable() else "".join(letter if letter.isprintable() else " " for letter in text)


def short(message: str) -> str:
    """Return the first line of a library's error message, cut to at most 160 characters, to quote it in ours."""
    line = message.strip().split("\n")[0].rstrip(".")
    return line if len(line) <= 160 else line[:157] + "…"


def _printable_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), None
    return True


# ------------------------------------------------------------------------------------------------------ numbers


@dataclass(frozen=True)
class Number:
    """A type and a range of numbers; both bounds belong to the range unless they are excluded.

    An instance is a ``type`` for argparse: it converts a text and refuses everything outside the range, ``nan`` and
    ``inf`` included, with a message that names the range. ``value in number`` tests a value from another source, such
    as JSON, and ``str(number)`` describes the range in words.
    """

    type: type[int] | type[float]
    least: float
    most: float
    above_least: bool = False  # whether ``least`` itself is excluded
    below_most: bool = False  # whether ``most`` itself is excluded

    def __call__(self, text: str) -> Any:
        try:
            value = self.type(text)
        except (ValueError, OverflowError):
            value = math.nan
        if value not in self:
            raise ArgumentTypeError(f"{printable(text[:20])!r} is not {self}")
        return value

    def __contains__(self, value: Any) -> bool:
        if type(value) not in (int, self.type):  # True is not a number here, and 2.0 is not a whole number
            return False
        return (value > self.least if self.above_least else value >= self.least) and (
            value < self.most if self.below_most else value <= self.most)

    def __str__(self) -> str:
        kind = "a whole number" if self.type is int else "a number"
        if self.above_least and self.below_most:
            return f"{kind} between {self.least:,} and {self.most:,}"
        if self.above_least or self.below_most:
            lower = f"above {self.least:,}" if self.above_least else f"from {self.least:,}"
            return f"{kind} {lower} and {'below' if self.below_most else 'up to'} {self.most:,}"
        return f"{kind} from {self.least:,} to {self.most:,}"


whole_number = Number(int, 0, LARGEST_NUMBER)
positive_number = Number(int, 1, LARGEST_NUMBER)
share = Number(float, 0, 1)
fraction = Number(float, 0, 1, above_least=True, below_most=True)
real_number = Number(float, -1_000_000, 1_000_000)
coefficient = Number(float, 0, 1_000_000)  # the weight of a loss or a penalty; 0 leaves it out
positive_real = Number(float, 0, 1_000_000, above_least=True)
learning_rate = Number(float, 0, 1_000_000)  # 0 leaves the weights as they are
worker_count = Number(int, 0, 1_000)  # each worker is a process
process_number = Number(int, -1, 1_000_000)  # given by a launcher; -1: there is no launcher
port_number = Number(int, 0, 65_535)


# ------------------------------------------------------------------------------------------------------- memory


def machine_memory() -> float:
    """Return the bytes of memory of this machine, or of the container if it has less; infinite if unknown."""
    if not hasattr(os, "sysconf"):
        return math.inf
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # there is no container, or its limit is the word "max"
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def require_memory(size: float, what: str, cure: str = "give less") -> None:
    """Raise `InputError` if the machine has less than ``size`` bytes, the minimum that ``what`` needs.

    ``what`` names the flag and its value, such as ``--batch_size 1000000000``.
    """
    if size > (memory := machine_memory()):
        raise InputError(f"{what} needs at least {size / 2 ** 30:,.0f} GiB, and this machine has "
                         f"{memory / 2 ** 30:,.0f}; {cure}")
