"""Attacks on a running server, with honest clients beside them: `make attack`.

    python tests/attack.py [files hosts …] [--short] [--soak MINUTES]

Each attack is tried on `demo.py` as people start it, with a tiny model of random weights, on a free port of 127.0.0.1;
no other address is asked anything, and requests and seconds are bounded. Prints a table of attempts and what came of
them; the exit status is 1 if one has succeeded.
"""

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import NamedTuple

import httpx
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import SAMPLE, TINY_TOKENS, make_checkpoint  # noqa: E402

from model import PostNormConfig, PostNormDoubleHeadsModel, save_model  # noqa: E402

WAIT = 120  # s; only a broken server ever takes as long
SECRET = "what only the server may read"


class Attempt(NamedTuple):
    what: str
    outcome: str
    withstood: bool


class Server:
    """`demo.py` in a process of its own."""

    def __init__(self, folder: Path, *flags: object):
        self.log = folder / f"log-{time.monotonic_ns()}"
        command = [sys.executable, ROOT / "demo.py", "--model_checkpoint", folder / "model", "--dataset_path", SAMPLE,
                   "--port", 0, "--device", "cpu", "--min_length", 4096, *flags]
        with open(self.log, "w") as output:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=folder, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
                     "GRADIO_TEMP_DIR": str(folder / "gradio")})
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
        """MiB that the process has in memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") >> 20

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(WAIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def make_model(folder: Path, layers: int = 2) -> None:
    """A model that never ends a reply by itself, with room for long contexts."""
    checkpoint = make_checkpoint(folder / "model", n_positions=8704, n_embd=32, n_head=2, n_layer=layers,
                                 vocab_size=TINY_TOKENS + 5, initializer_range=0.3)
    torch.manual_seed(5)
    save_model(PostNormDoubleHeadsModel(PostNormConfig.from_pretrained(checkpoint, num_labels=1)), checkpoint)


def talk(text: str = "hello", **options) -> dict:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 20, **options}


class Events:
    """The page's events by what they do, read from its configuration."""

    def __init__(self, address: str):
        config = httpx.get(f"{address}/config", timeout=WAIT).json()
        blocks = {block["id"]: block for block in config["components"]}
        self.all = [(event["id"], [blocks[number]["type"] for number in event["inputs"]], event["queue"])
                    for event in config["dependencies"] if event["backend_fn"]]
        self.values = {number: block["props"].get("value") for number, block in blocks.items()}
        self.dependencies = {event["id"]: event for event in config["dependencies"]}

    def turn(self, text: str = "hello", session: str = "somebody", **changed) -> dict:
        """The page's request for a reply. ``changed``: other values for the first slider, ``temperature``, and more."""
        number, kinds, _ = next(event for event in self.all if event[2] and "chatbot" in event[1])
        values = [self.values[block] for block in self.dependencies[number]["inputs"]]
        values[0], values[kinds.index("chatbot")] = text, []
        if "temperature" in changed:
            values[kinds.index("slider")] = changed["temperature"]
        return {"data": values, "fn_index": number, "session_hash": session}

    def sharing(self, first: object) -> dict:
        """The request that has a conversation packed, with something else as its first value."""
        number, kinds, _ = next(event for event in self.all if event[1] == ["textbox", "textbox", "chatbot", "textbox"])
        return {"data": [first, "", [], "x"], "fn_index": number, "session_hash": "somebody"}


# ------------------------------------------------------------------------------------------------------ the attacks


async def files(server: Server, client: httpx.AsyncClient) -> list[Attempt]:
    """Let the server open a file, or ask an address."""
    folder = server.log.parent
    secret = folder / "secret.txt"
    secret.write_text(SECRET)
    asked = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(SECRET.encode())

        def log_message(self, *_):
            pass

    elsewhere = HTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
    attempts, events = [], Events(server.address)

    async def attempt(what: str, method: str, path: str, **how) -> httpx.Response | None:
        try:
            response = await client.request(method, path, **{"timeout": 10} | how)
            outcome = f"{response.status_code} {response.text[:60]!r}"
        except httpx.TimeoutException:
            response, outcome = None, "no answer in 10 s"
        copies = [file for file in (folder / "gradio").rglob("*") if file.is_file() and b"only the server" in
                  file.read_bytes()[:100]]
        bad = response is None or SECRET in response.text or copies or asked or response.status_code < 400
        attempts.append(Attempt(what, outcome + f" {len(copies)} copied" * bool(copies) + " fetched" * bool(asked),
                                not bad))
        for file in copies:
            file.unlink()
        asked.clear()
        return response

    def file_of(path: str) -> dict:
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    places = {"a file": str(secret), "the repository's file": str(ROOT / "Makefile"), "a device": "/dev/zero",
              "a picture": "/x.svg", "an address": f"http://127.0.0.1:{elsewhere.server_port}/x"}
    for name, path in places.items():
        sharing = events.sharing(file_of(path))
        await attempt(f"{name} as a text of the page", "POST", "/gradio_api/run/share_it", json=sharing)
        await attempt(f"{name} as a text, by number", "POST", "/gradio_api/run/predict", json=sharing)
        for kind in ({"type": "file", "file": file_of(path)},
                     {"type": "component", "component": "file", "value": file_of(path), "constructor_args": {},
                      "props": {"value": path}}):
            call = events.sharing("")
            call["data"][2] = [{"role": "user", "content": [kind]}]
            await attempt(f"{name} in a conversation, as {kind['type']}", "POST", "/gradio_api/run/predict", json=call)
        turn = events.turn()
        turn["data"][0] = file_of(path)
        await attempt(f"{name} as a message", "POST", "/gradio_api/queue/join", json=turn)
        await attempt(f"{name} for programs", "POST", "/gradio_api/call/chat",
                      json={"data": [file_of(path), [], [], 0]})
        await attempt(f"{name} by file=", "GET", f"/gradio_api/file={path}")
        await attempt(f"{name} by file=, coded", "GET", f"/gradio_api/file%3D{path}")
        await attempt(f"{name} by proxy=", "GET", f"/gradio_api/proxy={path}")
    await attempt("a file among the assets", "GET", f"/assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f..{secret}")
    await attempt("upload", "POST", "/gradio_api/upload", files={"files": b"x"})
    await attempt("upload, another spelling", "POST", "//gradio_api/upload", files={"files": b"x"})
    await attempt("recording", "POST", "/gradio_api/process_recording", files={"video": b"x"})
    for route in ("deep_link?session_hash=x", "dev/reload", "upload_progress?upload_id=x", "custom_component/a/b/c/d",
                  "runs", "file/x", "stream/a/b/1/playlist.m3u8", "vibe-code", "token", "profiling/summary"):
        await attempt(route, "GET", f"/gradio_api/{route}")
    for route in ("component_server", "vibe-edit", "stream/x", "run/begin", "api/predict", "call/restore"):
        await attempt(route, "POST", f"/gradio_api/{route}", json={"data": []})
    for route in ("monitoring", "login_check", "docs", "openapi.json", "redoc"):
        await attempt(route, "GET", f"/{route}")
    elsewhere.shutdown()
    return attempts


async def hosts(server: Server, client: httpx.AsyncClient) -> list[Attempt]:
    """Pass for the server under another name, or from another page."""
    attempts = []

    def note(what: str, response: httpx.Response, withstood: bool) -> None:
        attempts.append(Attempt(what, f"{response.status_code} {response.text[:60]!r}", withstood))

    for name in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "evil.example@127.0.0.1", ""):
        for path in ("/", "/v1/models", "/config"):
            response = await client.get(path, headers={"Host": name})
            note(f"Host {name!r} at {path}", response, response.status_code == 400)
    for header in ("X-Forwarded-Host", "X-Gradio-Server", "Forwarded"):
        for path in ("/", "/config"):
            response = await client.get(path, headers={header: "http://evil.example" if "G" in header else
                                                       "host=evil.example" if header == "Forwarded" else
                                                       "evil.example"})
            note(f"{header} at {path}", response, response.is_success and "evil.example" not in response.text)
    for origin in ("http://evil.example", "http://127.0.0.1:1", "null"):
        for path in ("/v1/chat/completions", "/v1/models", "/gradio_api/queue/join", "/healthz", "/config"):
            asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            response = await client.options(path, headers=asks)
            note(f"leave for {origin} at {path}", response, response.status_code == 403
                 and "access-control-allow-origin" not in response.headers and "--allow_origin" in response.text)
        for path in ("/v1/models", "/config", "/healthz"):
            response = await client.get(path, headers={"Origin": origin})
            note(f"{origin} reads {path}", response, "access-control-allow-origin" not in response.headers)
    return attempts


# ------------------------------------------------------------------------------------------------- one after another

ATTACKS = {attack.__name__: attack for attack in (files, hosts)}


async def attack(server: Server, name: str) -> list[Attempt]:
    async with httpx.AsyncClient(base_url=server.address, timeout=WAIT) as client:
        attempts = await ATTACKS[name](server, client)
        alive = await client.get("/healthz")
        reply = await client.post("/v1/chat/completions", json=talk(max_tokens=3))
    attempts.append(Attempt("afterwards it lives and replies", f"{alive.status_code} {reply.status_code}",
                            alive.status_code == reply.status_code == 200))
    log = server.output()
    attempts.append(Attempt("its log has no traceback", f"{log.count('Traceback')} of them", "Traceback" not in log))
    return attempts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("attacks", nargs="*", default=list(ATTACKS), help=f"of {', '.join(ATTACKS)} (default: all)")
    args = parser.parse_args()
    succeeded = 0
    with tempfile.TemporaryDirectory() as work:
        make_model(Path(work))
        for name in args.attacks:
            print(f"\n{name}: {ATTACKS[name].__doc__}", flush=True)
            server = Server(Path(work))
            try:
                for attempt in asyncio.run(attack(server, name)):
                    succeeded += not attempt.withstood
                    print(f"  {'withstood' if attempt.withstood else 'SUCCEEDED':10} {attempt.what:50} "
                          f"{attempt.outcome}", flush=True)
            finally:
                server.end()
    print(f"\n{succeeded} attempts succeeded")
    return int(succeeded > 0)


if __name__ == "__main__":
    sys.exit(main())
