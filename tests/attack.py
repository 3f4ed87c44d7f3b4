"""Attack a running server while honest clients use it (`make attack`).

    python tests/attack.py [files hosts …] [--short] [--soak MINUTES]

The server is `demo.py` with a tiny model of random weights, on a free port of 127.0.0.1. No other address is contacted,
and the numbers of requests and seconds are bounded. The script prints a table of attempts and outcomes; the exit status
is 1 if an attempt succeeded.
"""

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
from attacked import ROOT, WAIT, Attempt, Events, Honest, Pace, Server, share_alike, stranger, talk, until_done
from conftest import make_parrot

from cli import positive_real

SECRET = "what only the server may read"


# ------------------------------------------------------------------------------------------------------ the attacks


async def files(server: Server, client: httpx.AsyncClient) -> list[Attempt]:
    """Make the server open a file or request an address."""
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
        drawing = events.drawing(file_of(path))
        await attempt(f"{name} as a text of the page", "POST", "/gradio_api/run/mixed", json=drawing)
        await attempt(f"{name} as a text, by number", "POST", "/gradio_api/run/predict", json=drawing)
        for kind in ({"type": "file", "file": file_of(path)},
                     {"type": "component", "component": "file", "value": file_of(path), "constructor_args": {},
                      "props": {"value": path}}):
            call = events.drawing([{"role": "user", "content": [kind]}])
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
    """Reach the server under another host name, or from another website."""
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


async def faults(server: Server, client: httpx.AsyncClient) -> list[Attempt]:
    """Spoil the replies of other clients with options that lead to NaN."""
    attempts, events = [], Events(server.address)
    wrong = [{"temperature": value} for value in (1e-300, 1e-38, 1e-5, -1, 1e308)] + [
        {"top_k": 10**9}, {"top_p": 1e300}, {"num_beams": 10**6}, {"num_beams": 17}, {"max_tokens": 0},
        {"max_tokens": 10**12}, {"seed": -2**64}, {"seed": 2**64}, {"n": 10**6}]

    async def attack_v1(options: dict) -> Attempt:
        response = await client.post("/v1/chat/completions", json=talk(**options))
        return Attempt(f"/v1 with {options}", f"{response.status_code} {response.text[:60]!r}",
                       response.status_code == 400 or options == {"max_tokens": 10**12})

    async def attack_page(number: int, temperature: float) -> Attempt:
        session = f"spoiler{number}"
        joined = await client.post("/gradio_api/queue/join", json=events.turn(session=session, temperature=temperature))
        told = await until_done(client, session)
        return Attempt(f"the page with temperature {temperature}", f"{joined.status_code} {told[-1][:60]!r}",
                       any("temperature" in line for line in told))

    honest = Honest(server)
    for _ in range(5 if Pace.judged else 1):
        async with honest:
            for _ in range(3):
                attempts = await asyncio.gather(*map(attack_v1, wrong))
                attempts += await asyncio.gather(*(attack_page(number, value) for number, value in
                                                   enumerate((1e-300, 1e-38))))
    return [*attempts, *honest.judged()]


async def contexts(server: Server, client: httpx.AsyncClient) -> list[Attempt]:
    """Delay others with the longest possible contexts and the widest search."""
    text = "🤯!" * 990
    messages = [{"role": "system", "content": text}, *({"role": ("user", "assistant")[number % 2], "content": text}
                                                       for number in range(5))]

    async def gaps() -> list[float]:
        """Return the seconds between the words of a long reply."""
        times = []
        body = talk(max_tokens=100 if Pace.short else 300, stream=True)
        async with client.stream("POST", "/v1/chat/completions", json=body,
                                 headers={"Authorization": "Bearer neighbour"}) as response:
            async for _ in response.aiter_bytes():
                times.append(time.perf_counter())
        return [after - before for before, after in zip(times, times[1:], strict=False)][2:]

    async def read(beams: int) -> tuple[int, int]:
        response = await client.post("/v1/chat/completions", headers={"Authorization": "Bearer reader"}, json={
            "messages": messages, "max_tokens": 5, "num_beams": beams})
        return response.status_code, response.json().get("usage", {}).get("prompt_tokens", 0)

    attempts = []
    for beams in (1, 4) if Pace.short else (1, 4, 6):  # 6: as wide as the memory allows
        honest, alone, beside = Honest(server), [], []
        for _ in range(7 if Pace.judged else 1):
            alone.append(await gaps())
            async with honest:
                neighbour, *answers = await asyncio.gather(gaps(), *(read(beams) for _ in range(4)))
            beside.append(neighbour)
        # Other programs lengthen gaps in some rounds; a delay by contexts shows in all rounds, and so in the minimum.
        ratios = [[max(one) / statistics.median(one) for one in rounds] for rounds in (alone, beside)]
        attempts.append(Attempt(
            f"{answers[0][1]:,} tokens four times, beams {beams}",
            f"{ {status for status, _ in answers} }; a neighbour's longest gap, in medians: "
            f"{sorted(round(one, 1) for one in ratios[1])}, without {sorted(round(one, 1) for one in ratios[0])}",
            {status for status, _ in answers} <= {200, 400} and (not Pace.judged or min(ratios[1]) < 4)))
        attempts += honest.judged()
    return attempts


async def memory(server: Server, client: httpx.AsyncClient) -> list[Attempt]:
    """Make the server use more memory than --memory allows, or keep it afterwards."""
    await asyncio.gather(*(client.post("/v1/chat/completions", json=talk()) for _ in range(8)))
    before, most, stated = server.memory(), 0, 0

    async def watch() -> None:
        nonlocal most, stated
        while True:
            state = (await client.get("/healthz")).json()
            most, stated = max(most, state["memory_mib"]), state["memory_allowed_mib"]
            await asyncio.sleep(0.05)

    async with Honest(server) as honest, stranger(server, 0) as greedy:
        watching = asyncio.create_task(watch())
        texts = ["🤯!" * size for size in (10, 100, 900)]
        statuses = [response.status_code for response in await asyncio.gather(*(greedy.post(
            "/v1/chat/completions", headers={"Authorization": f"Bearer {number}"},
            json=talk(texts[number % 3], num_beams=1 + number % 5,
                      max_tokens=20 if number % 4 else 400 if Pace.short else 4000))
            for number in range(30)))]
        watching.cancel()
    for _ in range(100):
        if (await client.get("/healthz")).json()["memory_mib"] <= 1:
            break
        await asyncio.sleep(0.1)
    await client.post("/v1/chat/completions", json=talk())
    kept = (await client.get("/healthz")).json()["memory_mib"]
    return [Attempt("30 long replies at once", f"{ {one: statuses.count(one) for one in statuses} }, at most {most} of "
                    f"{stated} MiB set aside", most <= stated),
            Attempt("memory afterwards", f"{kept} MiB set aside; process {before} MiB before, {server.memory()} after",
                    kept <= 8 and server.memory() < before + 200), *honest.judged()]


def attackers(server: Server, clients: int, body: dict, *flags: object) -> subprocess.Popen:
    """Start clients in their own process that send the next request at once; see attackers.py."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests/attackers.py", f"{server.host}:{server.port}", str(clients), json.dumps(body),
         *map(str, flags)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    share_alike(process)
    return process


async def pages(server: Server, client: httpx.AsyncClient) -> list[Attempt]:
    """Block the page with thousands of events, idle visitors and events that nobody fetches."""
    attempts, events = [], Events(server.address)

    async def visit(session: str, text: str = "hello") -> float:
        start = time.perf_counter()
        joined = await client.post("/gradio_api/queue/join", json=events.turn(text, session))
        done = joined.is_success and any('"success":true' in line for line in await until_done(client, session))
        return time.perf_counter() - start if done else float("inf")

    async with Honest(server) as honest:
        waits = [await visit(f"idle{number}") for number in range(10 if Pace.short else 60)]
        attempts.append(Attempt(f"{len(waits)} idle visitors", f"replies after {max(waits):.1f} s at most",
                                max(waits) < 30))
        before = server.memory()
        clients, seconds = (200, 4) if Pace.short else (2200, 60)
        flood = attackers(server, clients, events.turn(session="floodNUMBER"), "--path", "/gradio_api/queue/join",
                          "--source", "127.1.0.1", "--seconds", seconds)
        accepted, answered = map(int, (await asyncio.to_thread(flood.communicate))[0].split())
        state = await client.get("/healthz")
        wait, start = float("inf"), time.monotonic()
        while wait == float("inf") and time.monotonic() < start + 60:  # try again, as people do
            wait = await visit("honest", "still there ?")
            await asyncio.sleep(1)
        wait = time.monotonic() - start
        attempts.append(Attempt(f"events of {clients:,} clients at one address",
                                f"{answered:,} answered, {accepted:,} accepted, healthz {state.json()['status']}, "
                                f"a reply after {wait:.1f} s", state.status_code == 200 and wait < 60 and accepted > 0))
        attempts.append(Attempt("events that nobody fetched", f"{before} MiB before, {server.memory()} after",
                                server.memory() < before + 300))
        for path in ("/gradio_api/queue/data?session_hash=unknown", "/gradio_api/call/chat/unknown"):
            response = await client.get(path)
            attempts.append(Attempt(path, f"{response.status_code}", response.status_code == 404))
    return [*attempts, *honest.judged()]


async def flood(server: Server, client: httpx.AsyncClient) -> list[Attempt]:
    """Keep the server busy with requests that it refuses at once, from thousands of connections."""
    honest, attempts = Honest(server), []
    for path in ("/nothing", "/v1/completions") if Pace.short else ("/nothing", "/v1/completions", "/healthz"):
        async with honest:
            senders = attackers(server, 200 if Pace.short else 2000, {}, "--path", path, "--source", "127.1.0.1",
                                "--seconds", 2 if Pace.short else 20)
            good, answered = map(int, (await asyncio.to_thread(senders.communicate))[0].split())
        attempts.append(Attempt(f"{path} without a pause", f"{answered:,} answered, {good} of them well",
                                answered > good == 0))
    return [*attempts, *honest.judged()]


async def forgeries(server: Server, client: httpx.AsyncClient) -> list[Attempt]:
    """Send forged values to every event of the page: other types, texts that are not JSON, lone surrogates, nothing."""
    events, few = Events(server.address), asyncio.Semaphore(8)
    forgers = itertools.cycle([stranger(server, number) for number in range(100)])  # one address would have to wait
    statuses: collections.Counter[int] = collections.Counter()
    failed = []

    async def forge(what: str, path: str, body: dict) -> None:
        async with few:
            client = next(forgers)
            response = await client.post(path, content=json.dumps(body).encode(),
                                         headers={"Content-Type": "application/json"})
            told = [response.text]
            if response.is_success and path.endswith("join"):
                told = await until_done(client, body["session_hash"])
            elif response.is_success and path.endswith("chat"):
                told = [(await client.get(f"{path}/{response.json()['event_id']}")).text]
        statuses[response.status_code] += 1
        # Gradio says so when an event of the page fails; our own code answers with a message instead.
        if response.status_code not in (200, 400, 404) or '"success":false' in told[-1] or not told[-1]:
            failed.append(Attempt(what, f"{response.status_code} {told[-1][:60]!r}", False))

    await client.post("/gradio_api/queue/join", json=events.turn(session="twice"))
    fetching = [asyncio.create_task(until_done(client, "twice")) for _ in range(2)]  # once per page
    await asyncio.sleep(0.2)
    fetching[0].cancel()
    await asyncio.gather(fetching[1], *(forge(*one) for one in events.forged()))
    for path in ("/assets/" + "a" * 5000, "/assets/%00", "/static/%ff", "/v1/models/%ed%a0%80"):
        response = await client.get(path)
        statuses[response.status_code] += 1
        if response.status_code != 404:
            failed.append(Attempt(path[:40], f"{response.status_code}", False))
    for head in ("CONNECT evil.example:80 HTTP/1.1", "GET http://[::1 HTTP/1.1", "GET / HTTP/9.9", "GET /\xff HTTP/1.1",
                 "GET / HTTP/1.1\r\nContent-Length: -1", "PRI * HTTP/2.0", "\0"):
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(f"{head}\r\nHost: localhost\r\n\r\n".encode("latin-1"))
        answer = await reader.readline()
        writer.close()
        if not answer.startswith(b"HTTP/1.1 4"):
            failed.append(Attempt(repr(head), repr(answer), False))
    return [Attempt("forged events and addresses", f"{dict(statuses)}", not failed and statuses.total() > 1000),
            *failed]


async def until_idle(client: httpx.AsyncClient) -> None:
    while (state := (await client.get("/healthz")).json())["decoding"] or state["waiting"]:
        await asyncio.sleep(0.2)


async def crowd(server: Server, client: httpx.AsyncClient) -> list[Attempt]:
    """Crowd out honest clients with 200 streams from one client."""
    honest = Honest(server)
    for _ in range(5 if Pace.judged else 1):
        await until_idle(client)
        async with honest:
            streams = attackers(server, 200, talk(max_tokens=500, stream=True))
            await asyncio.sleep(3 if Pace.short else 12)
        streams.kill()
        await asyncio.to_thread(streams.wait)
    return honest.judged()


async def hanging(server: Server, client: httpx.AsyncClient) -> list[Attempt]:
    """Keep others from connecting with hundreds of half-open connections."""
    honest, attempts = Honest(server), []
    for _ in range(3 if Pace.judged else 1):
        open_ones = []
        async with honest:
            for number in range(100 if Pace.short else 600):
                reader, writer = await asyncio.open_connection(server.host, server.port)
                writer.write([b"", b"GET / HT", b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                              b"Content-Length: 99\r\nContent-Type: application/json\r\n\r\n{"][number % 3])
                open_ones.append((reader, writer))
            started = time.monotonic()
            closed = await asyncio.gather(*(asyncio.wait_for(reader.read(), 90) for reader, _ in open_ones),
                                          return_exceptions=True)
        left = sum(isinstance(one, Exception) and not isinstance(one, ConnectionError) for one in closed)
        attempts.append(Attempt(f"{len(open_ones)} half-open connections", f"{left} still open after "
                                f"{time.monotonic() - started:.0f} s", left == 0))
        for _, writer in open_ones:
            writer.close()
    return attempts + honest.judged()


async def overload(server: Server, client: httpx.AsyncClient) -> list[Attempt]:
    """Waste the server's time on refusals, with twice as many clients as it accepts, each with its own key."""
    rates = {96: [], 192: []}
    for number in range(20 if Pace.judged else 2):
        clients = (96, 192, 192, 96)[number % 4]
        seconds = 3 if Pace.short else 10
        load = attackers(server, clients, talk(), "--keys", "each", "--seconds", seconds)
        output, _ = await asyncio.to_thread(load.communicate)
        rates[clients].append(int(output.split()[0]) / seconds)
        await until_idle(client)
    accepted, twice = (statistics.mean(rates[clients]) for clients in rates)
    ratio = twice / accepted
    spread = ", then ".join(f"{min(one):.0f} to {max(one):.0f}" for one in rates.values())
    return [Attempt("twice the accepted load", f"{accepted:.1f} good replies per second, then {twice:.1f}: "
                    f"ratio {ratio:.2f}, {len(rates[96])} rounds each ({spread})", not Pace.judged or ratio >= 0.9)]


async def stopping(server: Server, client: httpx.AsyncClient) -> list[Attempt]:
    """Lose replies, or cause tracebacks, while the server shuts down."""
    async def stream() -> bool:
        body = talk(max_tokens=100, stream=True)
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            return b"[DONE]" in b"".join([part async for part in response.aiter_bytes()])

    running = [asyncio.create_task(stream()) for _ in range(4)]
    idle = asyncio.create_task(client.get("/gradio_api/heartbeat/somebody"))
    while (await client.get("/healthz")).json()["decoding"] < 4:
        await asyncio.sleep(0.05)
    server.process.terminate()
    await asyncio.sleep(0.3)
    late = []
    for _ in range(3):
        with contextlib.suppress(httpx.HTTPError):
            late.append(await client.post("/v1/chat/completions", json=talk()))
    whole = sum(await asyncio.gather(*running))
    status = await asyncio.to_thread(server.process.wait, WAIT)
    with contextlib.suppress(httpx.HTTPError):
        await idle
    return [Attempt("4 replies in progress at SIGTERM", f"{whole} whole, exit status {status}",
                    whole == 4 and status == 143),
            Attempt("requests after SIGTERM",
                    f"{[one.status_code for one in late]} {[one.text[:60] for one in late[:1]]}",
                    all(one.status_code == 503 and one.json()["error"]["message"] for one in late))]


# -------------------------------------------------------------------------------------------------- running the attacks

ATTACKS = {attack.__name__: attack for attack in (
    files, hosts, faults, contexts, memory, pages, flood, forgeries, crowd, hanging, overload, stopping)}


async def attack(server: Server, name: str) -> list[Attempt]:
    async with httpx.AsyncClient(base_url=server.address, timeout=WAIT, limits=httpx.Limits()) as client:
        attempts = await ATTACKS[name](server, client)
        if name != "stopping":
            alive = await client.get("/healthz")
            reply = await client.post("/v1/chat/completions", json=talk(max_tokens=3))
            attempts.append(Attempt("the server still replies", f"{alive.status_code} {reply.status_code}",
                                    alive.status_code == reply.status_code == 200))
    log = server.output()
    attempts.append(Attempt("no traceback in the log", f"{log.count('Traceback')} tracebacks", "Traceback" not in log))
    return attempts


async def soak(server: Server, minutes: float) -> list[Attempt]:
    """Let six users hold growing conversations for ``minutes`` minutes, and read the memory every half minute."""
    start, seen, lost, replies = time.monotonic(), [], 0, 0

    async def user(number: int) -> None:
        nonlocal lost, replies
        messages = [{"role": "system", "content": f"i am number {number} ."}]
        async with httpx.AsyncClient(base_url=server.address, timeout=WAIT) as client:
            while time.monotonic() < start + 60 * minutes:
                messages.append({"role": "user", "content": f"what is number {len(messages)} times {number} ?"})
                response = await client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 20})
                replies += 1
                if response.status_code == 200:
                    messages.append(response.json()["choices"][0]["message"])
                else:
                    lost += 1
                    messages = messages[:1]
                if len(json.dumps(messages)) > 200_000:  # a request may not be longer
                    messages = messages[:1]

    async def watch() -> None:
        while time.monotonic() < start + 60 * minutes:
            await asyncio.sleep(30)
            seen.append((time.monotonic() - start, server.memory()))
            print(f"  {seen[-1][0] / 60:5.1f} min {seen[-1][1]} MiB, {replies:,} replies", flush=True)

    await asyncio.gather(watch(), *map(user, range(6)))
    second = next(mib for seconds, mib in seen if seconds >= min(120, 30 * minutes))
    return [Attempt(f"soak of {minutes:g} minutes", f"{replies:,} replies, {lost} lost; {second} MiB at minute 2, "
                    f"{seen[-1][1]} MiB at the end", not lost and seen[-1][1] <= 1.1 * second)]


def tell(attempts: list[Attempt]) -> int:
    """Print one line per attempt, and return how many attempts succeeded."""
    for attempt in attempts:
        outcome = "withstood" if attempt.withstood else "SUCCEEDED"
        print(f"  {outcome:10} {attempt.what:50} {attempt.outcome}", flush=True)
    return sum(not attempt.withstood for attempt in attempts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("attacks", nargs="*", default=list(ATTACKS), help=f"any of {', '.join(ATTACKS)} (default: all)")
    parser.add_argument("--short", action="store_true", help="send fewer requests, and judge no times")
    parser.add_argument("--soak", type=positive_real, metavar="MINUTES", help="only let six users talk for this long")
    parser.add_argument("--model_checkpoint", metavar="MODEL",
                        help="attack a server of this model (default: a tiny random one)")
    args = parser.parse_args()
    Pace.short, Pace.judged = args.short, not args.short
    succeeded = 0
    with tempfile.TemporaryDirectory() as work:
        make_parrot(Path(work) / "model")
        for name in ["soak"] if args.soak else args.attacks:
            print(f"\n{name}: {(soak if args.soak else ATTACKS[name]).__doc__}", flush=True)
            server = Server(Path(work), "--memory", 1024 if args.model_checkpoint else 64, "--drain", 120,
                            model=args.model_checkpoint)
            try:
                succeeded += tell(asyncio.run(soak(server, args.soak) if args.soak else attack(server, name)))
            finally:
                server.end()
    print(f"\n{succeeded} attempts succeeded")
    return int(succeeded > 0)


if __name__ == "__main__":
    sys.exit(main())
