"""Serve the page of `feedback.annotate --web`, which asks people in the browser which of two replies is better."""

import asyncio
import json
import socket
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from uvicorn import Config

from web.connections import Connection, Server, listen

PAGE = Path(__file__).with_name("annotate.html")
LARGEST = 10_000  # bytes of an answer
PATIENCE = 20  # s within which a whole answer must arrive
NAMES = ["127.0.0.1", "localhost", "[::1]"]


def web_app(session) -> Starlette:
    """Return the app of a `feedback.annotate.Session`: the page sends names and answers and gets the next question."""
    page = PAGE.read_text("utf-8")

    async def show(request: Request) -> Response:
        return HTMLResponse(page)

    async def take(request: Request) -> Response:
        """Take a name, or a name with an answer, and send the next question; status 409 if the answer was rejected."""
        # Only our own page can send this type: for a page of another site, browsers ask the server first.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return JSONResponse({"error": "Content-Type is not application/json"}, 415)
        try:
            async with asyncio.timeout(PATIENCE):
                annotator, answer = read_answer(await whole_body(request))
        except TimeoutError:
            return JSONResponse({"error": f"the answer was not complete after {PATIENCE} seconds"}, 408)
        except ClientDisconnect:
            return Response()
        except ValueError as problem:
            return JSONResponse({"error": str(problem)}, 400)
        taken = answer is None or await run_in_threadpool(session.answer, annotator, *answer)
        question = await run_in_threadpool(session.question, annotator)
        return JSONResponse(question, 200 if taken else 409)

    return Starlette(routes=[Route("/", show, methods=["GET"]), Route("/", take, methods=["POST"])],
                     middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=NAMES, www_redirect=False)])


async def whole_body(request: Request) -> bytes:
    """Return the request's body. Raises ``ValueError`` if it is too long."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST:
            raise ValueError(f"the answer has more than {LARGEST:,} bytes")
    return body


def read_answer(body: bytes) -> tuple[str, tuple[str, str, dict[str, str]] | None]:
    """Return the annotator's name, and the other arguments of `feedback.annotate.Session.answer` or, without an
    answer, None.

    Raises ``ValueError`` if the page could not have sent this body.
    """
    try:
        sent = json.loads(body)
    except RecursionError:
        raise ValueError("the body is nested too deeply") from None
    if not isinstance(sent, dict):
        raise ValueError("the body is not a JSON object")
    questions = sent.get("questions", {})
    texts = [sent.get("annotator"), *(sent.get(key) for key in ("pair", "key") if "pair" in sent),
             *(questions.values() if isinstance(questions, dict) else [None])]
    try:
        "".join(texts).encode()  # UTF-8 cannot encode lone surrogates
    except (TypeError, UnicodeEncodeError):
        raise ValueError("annotator, pair, key and the values of questions must be text") from None
    annotator = texts[0].strip()[:100]
    return annotator, (sent["pair"], sent["key"], questions) if "pair" in sent else None


def web_server(session, port: int) -> tuple[Server, socket.socket]:
    """Return a server of the page, for this machine only, and a socket that listens; with ``port`` 0 at any free port.

    Raises `InputError` if the port is in use.
    """
    config = Config(web_app(session), http=Connection, ws="none", proxy_headers=False, log_level="error",
                    timeout_graceful_shutdown=3)
    server = Server(config, 0, drain=lambda: None, idle=lambda: True, end=lambda: None, stopping=asyncio.Event())
    return server, listen("127.0.0.1", port)
