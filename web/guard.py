"""Check all requests before the application sees them: number, route, size, time and client.

This file knows HTTP and the routes that the page needs; it knows neither models nor the page.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from web.clients import Client

MAX_BODY = 256 * 1024  # bytes: room for a very long conversation
DRAINED = 64 * MAX_BODY  # bytes of a longer body that are read and dropped before the request is refused
BODY_TIME = 20  # s within which a whole request must arrive
# The routes that the page, Gradio's client and OpenAI's need. Gradio has many more, some of which read files.
ROUTES = {
    "GET": re.compile(r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt"
                      r"|/(assets|static|svelte)/[A-Za-z0-9_./-]{1,200}"
                      r"|/gradio_api/(theme\.css|app_id/?|info/?|openapi\.json|startup-events|heartbeat/[\w-]{1,64}|queue/data"
                      r"|call/chat/[\w-]+)|/healthz|/v1(/.*)?"),
    "POST": re.compile(r"/gradio_api/(queue/join/?|run/predict/?|call/chat/?|cancel|reset/?)|/v1(/.*)?"),
}
PROGRAMS = re.compile(r"/v1/(chat/)?completions")
REPLY_ROUTES = re.compile(rf"/gradio_api/(queue/join/?|call/chat/?)|{PROGRAMS.pattern}")
# Gradio needs milliseconds for each of these, during which all others wait.
EXPENSIVE = re.compile(r"/|/config/?"
                       r"|/gradio_api/(info/?|openapi\.json|startup-events|queue/join/?|run/predict/?|call/chat/?)")
EXPENSIVE_PACE, PACE = (8, 16), (100, 200)  # requests of an address per second, and before that at once
LONGEST_WAIT = 30  # s for which a request may wait for its turn
MANY = 1000  # addresses
DELAY, LONGEST_DELAY = 0.5, 60  # s by which a refusal is delayed
REFUSALS = 16  # per second and address
UNTRUSTED = (b"x-forwarded-host", b"x-gradio-server")  # headers that Gradio trusts, though any client can send them


def error(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    """Return an error in OpenAI's format."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status,
                        headers={"Retry-After": "5"} if status in (429, 503) else None)


class Refused(ValueError):
    """The reason why a request is refused. ``status``: HTTP status code."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class Turns:
    """The times at which each address may send its next requests (the generic cell rate algorithm of ATM networks)."""

    def __init__(self, per_second: float, at_once: int):
        self.interval, self.at_once = 1 / per_second, at_once
        self.free: dict[str, float] = {}  # when an address may send ``at_once`` requests again

    def wait(self, address: str, counts: bool = True) -> float:
        """Return the seconds for which a new request must wait, and count it, unless they exceed `LONGEST_WAIT`."""
        now = time.monotonic()
        if len(self.free) > MANY:
            self.free = {one: free for one, free in self.free.items() if free > now}
        free = max(now, self.free.get(address, now)) + self.interval
        wait = max(0.0, free - now - self.at_once * self.interval)
        if counts and wait <= LONGEST_WAIT:
            self.free[address] = free
        return wait


class Delays:
    """Delay refusals, because clients that retry at once would otherwise keep the server busy with refusals.

    No address gets more than about `REFUSALS` per second. ``stopping``: ends all delays.
    """

    def __init__(self, stopping: asyncio.Event):
        self.stopping, self.delayed = stopping, Counter()  # number of delayed refusals, by address

    async def delay(self, address: str) -> None:
        """Wait until the address may get its next refusal."""
        self.delayed[address] += 1
        try:
            await self.sleep(min(max(DELAY, self.delayed[address] / REFUSALS), LONGEST_DELAY))
        finally:
            self.delayed[address] -= 1
            if not self.delayed[address]:
                del self.delayed[address]

    async def sleep(self, seconds: float) -> None:
        """Sleep until the time is over or the server stops."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)


def address_of(scope) -> str:
    """Return the address of a request's client; IPv6 addresses of one network are one."""
    return Client.at((scope["client"] or ("",))[0]).address


class Paced:
    """An ASGI middleware that lets an address with many requests wait, so that it does not keep the server busy.

    Requests wait before their bodies are read. Programs' requests for replies count only if they are refused: the
    decoder divides its work among those that are not.
    """

    def __init__(self, app, delays: Delays):
        self.app, self.delays = app, delays
        self.expensive, self.every = Turns(*EXPENSIVE_PACE), Turns(*PACE)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            address = address_of(scope)
            by_program = PROGRAMS.fullmatch(scope["path"])
            turns = self.expensive if EXPENSIVE.fullmatch(scope["path"]) else self.every
            wait = turns.wait(address, counts=not by_program)
            if wait > LONGEST_WAIT:
                await self.delays.delay(address)
                return await error(429, "Too many requests come from your address; try again in a minute.",
                                   "rate_limit_exceeded")(scope, receive, send)
            if wait:
                await self.delays.sleep(wait)
            if by_program:
                return await self.app(scope, receive, partial(self._send, send, address))
        await self.app(scope, receive, send)

    async def _send(self, send, address: str, event) -> None:
        if event["type"] == "http.response.start" and event["status"] >= 400:
            self.every.wait(address)
        await send(event)


class Guard:
    """An ASGI middleware that passes on complete requests of bounded size to known routes, and refuses all others.

    ``check``: gets path, query and body of a request to Gradio (None as the body of a GET request), and returns the
    body to pass on or raises `Refused`. ``busy``: gets the connection of a request for a reply and returns the reason
    why none can be given now, or None; the refusal is delayed. ``delays.stopping``: once set, endless answers end.
    """

    POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"

    def __init__(self, app, check: Callable[[str, str, bytes | None], bytes | None],
                 busy: Callable[[HTTPConnection], object | None], delays: Delays):
        self.app, self.check, self.busy, self.delays, self.stopping = app, check, busy, delays, delays.stopping

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # WebSocket is not supported
            return await send({"type": "websocket.close"})
        method, path = scope["method"].replace("HEAD", "GET"), scope["path"]
        if method == "OPTIONS" and (origin := Headers(scope=scope).get("origin")):
            return await error(403, f"Pages of {origin[:200]} may not use this server; allow them with --allow_origin.",
                               "origin_not_allowed")(scope, receive, send)
        if method not in ROUTES or not ROUTES[method].fullmatch(path) or ".." in path:
            other = path.startswith("/v1/") or any(route.fullmatch(path) for route in ROUTES.values())
            return await error(405 if other else 404, f"{scope['method']} {path[:200]} is not supported."
                               )(scope, receive, send)
        scope = dict(scope, headers=[header for header in scope["headers"]
                                     if header[0] not in UNTRUSTED])
        if not path.startswith("/gradio_api/"):
            scope["query_string"] = b""  # Gradio would look for a file that the query names
        body = None
        if method == "POST":
            try:
                async with asyncio.timeout(BODY_TIME):
                    body = await read(receive)
            except TimeoutError:
                return await error(408, f"The request was not complete after {BODY_TIME} seconds.", "request_timeout"
                                   )(scope, receive, send)
            if body is None:  # the client has disconnected
                return
            if len(body) > MAX_BODY:
                return await error(413, f"The request has more than {MAX_BODY:,} bytes; send less.",
                                   "request_too_large")(scope, receive, send)
        if method == "POST" and REPLY_ROUTES.fullmatch(path) and (reason := self.busy(HTTPConnection(scope))):
            body = None  # it may be large
            await self.delays.delay(address_of(scope))
            return await error(503, str(reason), "queue_full")(scope, receive, send)
        if path.startswith("/gradio_api/"):
            try:
                body = self.check(path, scope["query_string"].decode("latin-1"), body)
            except Refused as problem:
                return await error(problem.status, str(problem), "invalid_value")(scope, receive, send)
        if body is not None:
            length = b"%d" % len(body)
            scope["headers"] = [(name, length if name == b"content-length" else value)
                                for name, value in scope["headers"] if name != b"transfer-encoding"]
            receive = replayed(body, receive)
        receive = self.until_stopped(receive)

        async def send_with_policy(event) -> None:
            if event["type"] == "http.response.start":
                event["headers"] = [*event["headers"], (b"content-security-policy", self.POLICY),
                                    (b"x-content-type-options", b"nosniff")]
            await send(event)

        try:
            await self.app(scope, receive, send_with_policy)
        except RuntimeError as problem:  # Gradio forgot the page while it was sending messages to it
            if not isinstance(problem.__cause__, HTTPException):
                raise
            await send({"type": "http.response.body"})

    def until_stopped(self, receive):
        """Return a ``receive`` that reports a disconnected client once the server stops."""

        async def received():
            tasks = [asyncio.ensure_future(receive()), asyncio.ensure_future(self.stopping.wait())]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                return tasks[0].result() if tasks[0].done() else {"type": "http.disconnect"}
            finally:
                for task in tasks:
                    task.cancel()

        return received


async def read(receive) -> bytes | None:
    """Read a request's body, at most one byte more than `MAX_BODY`; return None if the client has disconnected.

    FastAPI's own limit answers while the request is still arriving, which most clients take for a broken connection.
    """
    body, size, more = [], 0, True
    while more and size < DRAINED:
        event = await receive()
        if event["type"] != "http.request":
            return None
        size += len(event.get("body", b""))
        more = event.get("more_body", False)
        if size <= MAX_BODY:
            body.append(event.get("body", b""))
    return b"".join(body) if size <= MAX_BODY else bytes(MAX_BODY + 1)


def replayed(body: bytes, receive):
    """Return a ``receive`` that first gives this body, then whatever the given ``receive`` gives."""
    first = {"type": "http.request", "body": body}

    async def replay():
        nonlocal first
        event, first = first, None
        return event or await receive()

    return replay
