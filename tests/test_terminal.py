"""Test the chat on a real terminal: labels, commands, and keys that stop a reply, the chat or its start."""

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

from conftest import LONG, ROOT, make_checkpoint, script


def test_a_terminal_session(trained, tmp_path):
    chat = ["interact.py", "--model_checkpoint", trained, "--personality", "i am a baker .", "--seed", "2"]
    for ending in (b"\x04", b"\x03"):
        screen, status = in_a_terminal(chat, [(b"Loading", b""), (b"you: ", b"  \r"), (b"line is empty", b""),
                                              (b"you: ", ending)], tmp_path, NO_COLOR="1")
        assert status == 0 and "Traceback" not in screen and "i am a baker ." in screen and "Ctrl-D" in screen
        assert "\x1b[1;" not in screen
    screen, status = in_a_terminal(chat, [
        (b"you: ", b"/retry\r"), (b"no message yet", b""), (b"you: ", b"/save talk.json\r"), (b"talk first", b""),
        (b"you: ", b"hello\r"), (b"bot: ", b""), (b"you: ", b"/retry\r"), (b"bot: ", b""),
        (b"you: ", b"what do you do ?\r"), (b"bot: ", b""), (b"you: ", b"/save talk.json\r"), (b"Saved", b""),
        (b"you: ", b"/save talk.json\r"), (b"exists already", b""), (b"you: ", b"/help\r"), (b"/reset", b""),
        (b"you: ", b"/persona i fly kites .\r"), (b"i fly kites .", b""), (b"you: ", b"/persona no.txt\r"),
        (b"/persona no.txt: no such file", b""), (b"you: ", b"/reset\r"), (b"new conversation", b""),
        (b"you: ", b"Abort!\r"),
    ], tmp_path)
    assert status == 0 and "Traceback" not in screen and "\x1b[1;32myou: \x1b[0m" in screen, screen
    (entry,) = json.loads((tmp_path / "talk.json").read_text())["valid"]
    assert entry["personality"] == ["i am a baker ."]
    assert [turn["history"][-1] for turn in entry["utterances"]] == ["hello", "what do you do ?"]
    assert entry["utterances"][1]["history"][1] == entry["utterances"][0]["candidates"][0]
    replies = [line.partition("bot: \x1b[0m")[2].strip() for line in screen.splitlines() if "bot: " in line]
    assert replies[1:] == [turn["candidates"][0] for turn in entry["utterances"]]  # /retry removed the first reply
    assert "well-formed" in script("example_entry.py", "talk.json", cwd=tmp_path)


def test_ctrl_c_stops_a_reply_then_the_chat(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "talker", n_layer=2, n_embd=64, n_positions=2 * LONG)
    screen, status = in_a_terminal(
        ["interact.py", "--model_checkpoint", checkpoint, "--personality", "i am .", "--seed", "2",
         "--min_length", LONG, "--max_length", LONG],
        [(b"you: ", b"hello\r"), (b"bot: ", None), (b" ", b"\x03"), (b"(stopped)", b""), (b"you: ", b"/save it.json\r"),
         (b"you: ", b"\x03")], tmp_path)
    assert status == 0 and "Traceback" not in screen, screen
    (turn,) = json.loads((tmp_path / "it.json").read_text())["valid"][0]["utterances"]
    assert turn["history"] == ["hello"] and 0 < len(turn["candidates"][0].split()) < LONG // 2


def test_ctrl_c_during_loading(trained, tmp_path):
    screen, status = in_a_terminal(["interact.py", "--model_checkpoint", trained, "--personality", "i am ."],
                                   [(b"Loading", b"\x03")], tmp_path)
    assert status == 130 and "Traceback" not in screen, screen


def in_a_terminal(arguments, dialog, cwd, **env):
    """Run a script on a pseudo-terminal: wait for each text, then type its answer; return screen and exit status."""
    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs of a shell, such as test runs, ignore it

    process = subprocess.Popen([sys.executable, ROOT / arguments[0], *map(str, arguments[1:])], cwd=cwd,
                               stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                               env={**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm", **env},
                               preexec_fn=take_terminal)
    os.close(theirs)
    screen, seen = b"", 0

    def read(seconds: float) -> bool:
        nonlocal screen
        if not select.select([ours], [], [], seconds)[0]:
            return False
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other end is closed
            return False
        screen += piece
        return bool(piece)

    try:
        for text, answer in dialog:
            deadline = time.monotonic() + 60
            while text not in screen[seen:]:
                assert time.monotonic() < deadline and (read(1) or process.poll() is None), screen.decode()
            seen = screen.index(text, seen) + len(text)
            if answer:
                time.sleep(0.5)  # CPython misses a Ctrl-C within a millisecond of the prompt; people are slower
                os.write(ours, answer)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            read(0.2)
        while read(0.2):
            pass
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        os.close(ours)
    return screen.decode(errors="replace"), process.wait()
