"""Serve the page of `feedback.annotate --web`, which asks people in the browser which of two replies is better."""

import asyncio
import logging
import socket
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from uvicorn import Config

from cli import InputError
from web.connections import Connection, Server, listen

PAGE = Path(__file__).with_name("annotate.html")
LARGEST = 10_000  # bytes of an answer
PATIENCE = 20  # s within which a whole answer must arrive
POLICY = {"Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
          "img-src data:; connect-src 'self'; frame-ancestors 'none'"}
logger = logging.getLogger("feedback.annotate")


class Answer(BaseModel):
    """A message from the page: a name and, after the first question, the arguments of `Session.answer`."""

    model_config = ConfigDict(strict=True)

    annotator: Annotated[str, StringConstraints(strip_whitespace=True, max_length=100)]
    pair: str | None = None
    key: str = ""
    questions: dict[str, str] = {}


def web_app(session) -> Starlette:
    """Return the app of a `feedback.annotate.Session`: the page sends names and answers and gets the next question."""
    page = PAGE.read_text("utf-8")

    async def show(request: Request) -> Response:
        return HTMLResponse(page, headers=POLICY)

    async def take(request: Request) -> Response:
        """Take a name, or a name with an answer, and send the next question; status 409 if the answer was rejected."""
        # Only our own page can send this type: for a page of another site, browsers ask the server first.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return JSONResponse({"error": "Content-Type is not application/json"}, 415)
        try:
            async with asyncio.timeout(PATIENCE):
                sent = Answer.model_validate_json(await request.body())
            taken = sent.pair is None or await run_in_threadpool(session.answer, sent.annotator, sent.pair, sent.key,
                                                                 sent.questions)
        except TimeoutError:
            return JSONResponse({"error": f"the answer was not complete after {PATIENCE} seconds"}, 408)
        except ClientDisconnect:
            return Response()
        except ValidationError as problem:
            first = problem.errors()[0]
            return JSONResponse({"error": ": ".join([*map(str, first["loc"]), first["msg"]])}, 400)
        except InputError as problem:  # the disk is full, for example
            logger.error(problem)
            return JSONResponse({"error": str(problem)}, 507)
        question = await run_in_threadpool(session.question, sent.annotator)
        return JSONResponse(question, 200 if taken else 409)

    return Starlette(routes=[Route("/", show, methods=["GET"]), Route("/", take, methods=["POST"])], middleware=[
        Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"], www_redirect=False),
        Middleware(RequestBodyLimitMiddleware, max_body_size=LARGEST)])


def web_server(session, port: int) -> tuple[Server, socket.socket]:
    """Return a server of the page, for this machine only, and a socket that listens; with ``port`` 0 at any free port.

    Raises `InputError` if the port is in use.
    """
    config = Config(web_app(session), http=Connection, ws="none", proxy_headers=False, log_level="error",
                    timeout_graceful_shutdown=3)
    server = Server(config, 0, drain=lambda: None, idle=lambda: True, end=lambda: None, stopping=asyncio.Event())
    return server, listen("127.0.0.1", port)
