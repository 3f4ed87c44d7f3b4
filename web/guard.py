"""The server's door: which requests come in, how large, from whom, and for how long.

This file knows HTTP, and the names of the routes that our page needs; it knows no model and no page.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Callable

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection

from web.batching import Client

MAX_BODY = 256 * 1024  # bytes of a request: a very long conversation
DRAINED = 64 * MAX_BODY  # bytes of a longer one that are read, and thrown away, before it is refused
BODY_TIME = 20  # s, in which the whole of a request must have come
# What the page, Gradio's own client and OpenAI's ask for. Gradio has many more routes, some of which read files.
ROUTES = {
    "GET": re.compile(r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static|svelte)/.+"
                      r"|/gradio_api/(theme\.css|app_id/?|info/?|openapi\.json|startup-events|heartbeat/[\w-]{1,64}|queue/data"
                      r"|call/chat/[\w-]+)|/healthz|/v1(/.*)?"),
    "POST": re.compile(r"/gradio_api/(queue/join/?|run/predict/?|call/chat/?|cancel|reset/?)|/v1(/.*)?"),
}
ASKING = re.compile(r"/gradio_api/(queue/join/?|call/chat/?)|/v1/(chat/)?completions")  # for a reply
HELD, MOST_HELD = 0.5, 1000  # s that a refusal is held back; how many at once
REFUSALS = 16  # per second and address
BELIEVED = (b"x-forwarded-host", b"x-gradio-server")  # by Gradio, though anybody can send them


def error(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    """An error as OpenAI's clients expect it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status,
                        headers={"Retry-After": "5"} if status == 503 else None)


class Refused(ValueError):
    """A request that nothing here can answer. ``status``: of HTTP."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class Guard:
    """Lets through the requests that something here answers, as far as they are whole and not too long.

    ``check``: gets path, query and body, None in a GET request, of what is asked of Gradio, and returns the body to go
    on with; it may raise `Refused`. ``busy``: gets the connection of a request for a reply and returns why there is
    none now, or None. ``stopping``: when it is set, answers without end are ended.

    A refusal is cheap, and it is held back for `HELD` seconds, or longer, so that no address gets more than `REFUSALS`
    per second: clients that ask again at once would otherwise keep the server busy with refusals.
    """

    POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"

    def __init__(self, app, check: Callable[[str, str, bytes | None], bytes | None],
                 busy: Callable[[HTTPConnection], Exception | None], stopping: asyncio.Event):
        self.app, self.check, self.busy, self.stopping = app, check, busy, stopping
        self.held = Counter()  # refusals held back now, by address

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # nothing here speaks WebSocket
            return await send({"type": "websocket.close"})
        method, path = scope["method"].replace("HEAD", "GET"), scope["path"]
        if method == "OPTIONS" and (origin := Headers(scope=scope).get("origin")):
            return await error(403, f"Pages of {origin[:200]} may not use this server; --allow_origin lets them.",
                               "origin_not_allowed")(scope, receive, send)
        if method not in ROUTES or not ROUTES[method].fullmatch(path) or ".." in path:
            other = path.startswith("/v1/") or any(route.fullmatch(path) for route in ROUTES.values())
            return await error(405 if other else 404, f"{scope['method']} {path[:200]} is not offered here."
                               )(scope, receive, send)
        scope = dict(scope, headers=[header for header in scope["headers"]
                                     if header[0] not in BELIEVED])
        if not path.startswith("/gradio_api/"):
            scope["query_string"] = b""  # the page's parameters are its own; Gradio would look for a file of them
        body = None
        if method == "POST":
            try:
                async with asyncio.timeout(BODY_TIME):
                    body = await read(receive)
            except TimeoutError:
                return await error(408, f"The request was not whole after {BODY_TIME} seconds.", "request_timeout"
                                   )(scope, receive, send)
            if body is None:  # the client has gone and needs no answer
                return
            if len(body) > MAX_BODY:
                return await error(413, f"The request has more than {MAX_BODY:,} bytes; send less.",
                                   "request_too_large")(scope, receive, send)
            if ASKING.fullmatch(path) and (reason := self.busy(HTTPConnection(scope))):
                if self.held.total() < MOST_HELD and not self.stopping.is_set():
                    address = Client.at((scope["client"] or ("",))[0]).address
                    self.held[address] += 1
                    await asyncio.sleep(max(HELD, self.held[address] / REFUSALS))
                    self.held[address] -= 1
                    self.held += Counter()  # forgets who has none left
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

        await self.app(scope, receive, send_with_policy)


    def until_stopped(self, receive):
        """A ``receive`` for which the client is gone once the server stops."""

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
    """A request's body, at most a byte more than `MAX_BODY`; None when the client is gone.

    FastAPI's own limit answers while the request is still coming, which most clients take for a broken connection.
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
    """A ``receive`` that has this body in it, and then what ``receive`` has."""
    first = {"type": "http.request", "body": body}

    async def replay():
        nonlocal first
        event, first = first, None
        return event or await receive()

    return replay
