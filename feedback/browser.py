"""Ask people in the browser which of two replies is better: the page of `feedback.annotate --web`."""

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
PATIENCE = 20  # s, in which an answer must have come
NAMES = ["127.0.0.1", "localhost", "[::1]"]


def web_app(session) -> Starlette:
    """The page of a `feedback.annotate.Session`: it gets the next question for an answer, or for a name alone."""
    page = PAGE.read_text("utf-8")

    async def show(request: Request) -> Response:
        return HTMLResponse(page)

    async def take(request: Request) -> Response:
        """Take an answer, or a name alone, and send the next question. 409 when the answer was not taken."""
        # Only our own page can send this type: a stranger's page would have to ask the browser's leave first.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return JSONResponse({"error": "Content-Type is not application/json"}, 415)
        try:
            async with asyncio.timeout(PATIENCE):
                annotator, answer = read_answer(await whole_body(request))
        except TimeoutError:
            return JSONResponse({"error": f"the answer was not whole after {PATIENCE} seconds"}, 408)
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
    """Return the request's body. Raises ``ValueError`` when it is too long."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST:
            raise ValueError(f"an answer has at most {LARGEST:,} bytes")
    return body


def read_answer(body: bytes) -> tuple[str, tuple[str, str, dict[str, str]] | None]:
    """Return who sends it and what `feedback.annotate.Session.answer` takes besides; None when only the name came.

    Raises ``ValueError`` for what the page does not send.
    """
    try:
        sent = json.loads(body)
    except RecursionError:
        raise ValueError("its lists or objects are nested too deeply") from None
    if not isinstance(sent, dict):
        raise ValueError("the body is not a JSON object")
    questions = sent.get("questions", {})
    texts = [sent.get("annotator"), *(sent.get(key) for key in ("pair", "key") if "pair" in sent),
             *(questions.values() if isinstance(questions, dict) else [None])]
    try:
        "".join(texts).encode()  # no file can hold half of a surrogate pair
    except (TypeError, UnicodeEncodeError):
        raise ValueError("annotator, pair, key and what questions holds must be text") from None
    annotator = texts[0].strip()[:100]
    return annotator, (sent["pair"], sent["key"], questions) if "pair" in sent else None


def web_server(session, port: int) -> tuple[Server, socket.socket]:
    """Return a server of the page for this machine alone and the socket to run it with; ``port`` 0: any free one.

    Raises `InputError` when the port is taken.
    """
    config = Config(web_app(session), http=Connection, ws="none", proxy_headers=False, log_level="error",
                    timeout_graceful_shutdown=3)
    server = Server(config, 0, drain=lambda: None, idle=lambda: True, end=lambda: None, stopping=asyncio.Event())
    return server, listen("127.0.0.1", port)
