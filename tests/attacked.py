"""Run the server that attack.py attacks, `demo.py` with a tiny model, and honest clients that use it meanwhile."""

import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import SAMPLE  # noqa: E402

WAIT = 120  # seconds; only a broken server takes this long


class Pace:
    """Settings of the attacks: ``short`` means fewer requests, ``judged`` means that times are judged."""

    short = judged = False


class Attempt(NamedTuple):
    what: str
    outcome: str
    withstood: bool


def share_alike(process: subprocess.Popen) -> None:
    """Give another session's process our own priority on systems where Linux shares the cores out by session.

    Real attackers compute on their own machines, so their work must not be taken out of the server's share.
    """
    with contextlib.suppress(OSError):
        if ours := Path("/proc/self/autogroup").read_text().split():  # empty where Linux does not group by session
            Path(f"/proc/{process.pid}/autogroup").write_text(ours[-1])


class Server:
    """Run `demo.py` in its own process."""

    def __init__(self, folder: Path, *flags: object, model: object = None):
        self.log = folder / f"log-{time.monotonic_ns()}"
        command = [sys.executable, ROOT / "demo.py", "--model_checkpoint", model or folder / "model",
                   "--dataset_path", SAMPLE, "--port", 0, "--device", "cpu", "--min_length", 4096, *flags]
        with open(self.log, "w") as output:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=folder, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
                     "GRADIO_TEMP_DIR": str(folder / "gradio")}, start_new_session=True)
        share_alike(self.process)
        start = time.monotonic()
        while not (found := re.search(r"Open (http://\S+) in a browser", self.output())):
            if self.process.poll() is not None or time.monotonic() - start > WAIT:
                raise SystemExit(self.output())
            time.sleep(0.1)
        self.address = found[1]
        self.host, self.port = self.address.removeprefix("http://").split(":")

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def memory(self) -> int:
        """Return the resident memory of the process in MiB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") >> 20

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(WAIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def talk(text: str = "hello", **options) -> dict:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 20, **options}


class Events:
    """The page's events, read from its configuration and identified by what they do."""

    def __init__(self, address: str):
        config = httpx.get(f"{address}/config", timeout=WAIT).json()
        blocks = {block["id"]: block for block in config["components"]}
        self.all = [(event["id"], [blocks[number]["type"] for number in event["inputs"]], event["queue"])
                    for event in config["dependencies"] if event["backend_fn"]]
        self.values = {number: block["props"].get("value") for number, block in blocks.items()}
        self.dependencies = {event["id"]: event for event in config["dependencies"]}

    def turn(self, text: str = "hello", session: str = "somebody", **changed) -> dict:
        """Build the page's request for a reply; ``changed`` may hold a ``temperature`` for the first slider."""
        number, kinds, _ = next(event for event in self.all if event[2] and "checkbox" in event[1])
        values = [self.values[block] for block in self.dependencies[number]["inputs"]]
        values[0] = conversation(persona=[], said=[text])
        if "temperature" in changed:
            values[kinds.index("slider")] = changed["temperature"]
        return {"data": values, "fn_index": number, "session_hash": session}

    def drawing(self, first: object) -> dict:
        """Build the page's request to draw sentences for a personality, with ``first`` as its value."""
        number = next(event[0] for event in self.all if event[1] == ["textbox"] and not event[2])
        return {"data": [first], "fn_index": number, "session_hash": "somebody"}

    def forged(self) -> Iterator[tuple[str, str, dict]]:
        """Yield requests that our page never sends, for each of its events: a description, the path and the body.

        Each request has one odd value, either in the place of a value or within the conversation that a text holds.
        """
        for number, kinds, queued in self.all:
            event = self.dependencies[number]
            name, sent = event["api_name"], [self.values.get(block) for block in event["inputs"]]
            route = "queue/join" if queued else "run/predict"
            if name == "chat":  # this event is for programs
                sent, route = ["hello", ["hi"], ["i am a cat ."], 0], "call/chat"
            elif kinds[:1] == ["textbox"]:
                sent[0] = conversation()
            about = {"index": 1, "liked": True, "value": "x"}  # a rating of a message
            bodies = [{"data": value} for value in ODD]
            for place, kind in enumerate(kinds):
                odd = {"textbox": [*ODD, *ODD_TEXTS], "state": []}.get(kind, ODD)
                bodies += [{"data": [*sent[:place], value, *sent[place + 1:]]} for value in odd]
            if event["collects_event_data"]:
                bodies += [{"event_data": value} for value in ODD]
                bodies += [{"event_data": about | {key: value}} for key in about for value in [*ODD, 0, 4]]
            for count, body in enumerate(bodies):
                yield f"{name} with {str(body)[:200]}", f"/gradio_api/{route}", {
                    "data": sent, "fn_index": number, "session_hash": f"forged-{name}-{count}",
                    "event_data": about} | body
        for value in ODD:
            for key in ("session_hash", "event_id", "fn_index", "trigger_id"):
                for route in ("cancel", "reset", "run/predict"):
                    yield f"{route} with {key} {str(value)[:40]}", f"/gradio_api/{route}", self.drawing("") | {
                        "event_id": "x", key: value}


def conversation(**changed: object) -> str:
    """Build the text that page.js sends for a conversation; ``changed`` replaces some of its values."""
    return json.dumps({"turn": 1, "conversation": "x", "persona": ["i am a cat ."], "own": [], "said": ["hello"]}
                      | changed)


DEEP: object = []
for _ in range(800):
    DEEP = [DEEP]
ODD = [None, True, -1, 1.5, 1e308, 10**400, "", "\ud800", "x" * 5000, [], [None], ["\ud800"], {"a": 1}, DEEP]
ODD_TEXTS = ["{", "null", "[]", "NaN", "1e999", "[" * 5000, '"\\ud800"', conversation(said=["a", "b"]),
             *(conversation(**{key: value}) for key in json.loads(conversation()) for value in ODD)]


def stranger(server: Server, number: int) -> httpx.AsyncClient:
    """Return a client at an address of its own; Linux answers at all addresses that begin with 127."""
    transport = httpx.AsyncHTTPTransport(local_address=f"127.1.{number // 250}.{1 + number % 250}",
                                         limits=httpx.Limits())
    return httpx.AsyncClient(base_url=server.address, timeout=WAIT, transport=transport)


async def until_done(client: httpx.AsyncClient, session: str) -> list[str]:
    """Return the lines that Gradio sends to a page until its event is over."""
    lines = []
    async with client.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as response:
        async for line in response.aiter_lines():
            lines.append(line)
            if "process_completed" in line or "unexpected_error" in line:
                break
    return lines or [""]


class Honest:
    """Four clients with their own keys, each of which asks one question after the other.

    They run during an attack and, alternately, without it: on a busy machine only neighbouring times can be compared.
    """

    def __init__(self, server: Server):
        self.server, self.lost = server, []
        self.rounds: list[tuple[list[float], list[float]]] = []  # seconds per reply: without the attack, with it

    async def _ask(self, number: int) -> None:
        async with httpx.AsyncClient(base_url=self.server.address, timeout=WAIT) as client:
            while not self.over.is_set():
                start = time.perf_counter()
                try:
                    response = await client.post("/v1/chat/completions", json=talk(f"hello {number}"),
                                                 headers={"Authorization": f"Bearer honest {number}"})
                    whole = response.status_code == 200 and response.json()["usage"]["completion_tokens"] == 20
                    problem = "" if whole else response.text[:80]
                except httpx.HTTPError as error:
                    problem = repr(error)
                if problem:
                    self.lost.append(problem)
                self.waits.append(time.perf_counter() - start)

    async def __aenter__(self) -> "Honest":
        self.quiet: list[float] = []
        if Pace.judged:
            await self._begin()
            await asyncio.sleep(5)
            await self._end()
            self.quiet = self.waits
        await self._begin()
        return self

    async def _begin(self) -> None:
        self.over, self.waits = asyncio.Event(), []
        self.tasks = [asyncio.create_task(self._ask(number)) for number in range(4)]

    async def _end(self) -> None:
        self.over.set()
        await asyncio.gather(*self.tasks)

    async def __aexit__(self, *_) -> None:
        await self._end()
        self.rounds.append((self.quiet, self.waits))

    def judged(self) -> list[Attempt]:
        replies = sum(len(waits) for _, waits in self.rounds)
        attempts = [Attempt("honest replies lost", f"{len(self.lost)} of {replies} {self.lost[:1] or ''}",
                            not self.lost and replies > 0)]
        if Pace.judged:
            p99s = [[sorted(waits)[int(0.99 * (len(waits) - 1))] for waits in both] for both in self.rounds]
            without, during = (1000 * statistics.median(both) for both in zip(*p99s, strict=True))
            ratio = statistics.median(with_it / alone for alone, with_it in p99s)
            attempts.append(Attempt("honest p99", f"{without:.0f} ms without the attack, {during:.0f} with: "
                                    f"{ratio:.1f} times, median of {len(p99s)} rounds", ratio <= 2))
        return attempts
