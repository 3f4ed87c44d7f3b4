"""Talk to a model in the browser, or from a program: a page, OpenAI's interface and Gradio's own, at one address.

    python demo.py --model_checkpoint runs/<your run>

The replies of all visitors are decoded together (web/batching.py); the page is in web/page.py; this file knows HTTP.
"""

import errno
import json
import logging
import socket
import sys
import time
import uuid
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Literal

try:
    import gradio as gr
except ModuleNotFoundError:  # training and chat do without
    print("demo.py: error: the page needs gradio; pip install -r requirements-web.txt", file=sys.stderr)
    sys.exit(2)
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field, field_validator
from starlette.exceptions import HTTPException

from cli import InputError, command, port_number, positive_number
from decoding import add_decoding_flags
from tables import TokenTable
from utils import add_common_flags, dataset_of, published_or_persona
from web.batching import Bot, Busy, Decoding, Reply
from web.page import HEAD, STYLE, THEME, build_page, sentences

MAX_BODY = 256 * 1024  # bytes of a request: a very long conversation
DRAINED = 64 * MAX_BODY  # bytes of a longer one that are read, and thrown away, before it is refused
logger = logging.getLogger("demo")


class Guard:
    """Refuses requests that are too long before they take memory, and keeps pages from loading anything elsewhere.

    FastAPI's own limit answers while the request is still coming, which most clients take for a broken connection.
    """

    POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"].startswith("/gradio_api/upload"):  # nothing here takes files
            return await error(404, "Files cannot be uploaded here.")(scope, receive, send)
        body, size, more = [], 0, True
        while more and size < DRAINED:
            event = await receive()
            if event["type"] != "http.request":
                return
            size += len(event.get("body", b""))
            more = event.get("more_body", False)
            if size <= MAX_BODY:
                body.append(event.get("body", b""))
        if size > MAX_BODY:
            refusal = error(413, f"The request has more than {MAX_BODY:,} bytes; send less.", code="request_too_large")
            return await refusal(scope, receive, send)
        first = {"type": "http.request", "body": b"".join(body)}

        async def replay():
            nonlocal first
            event, first = first, None
            return event or await receive()

        async def send_with_policy(event) -> None:
            if event["type"] == "http.response.start":
                event["headers"] = [*event["headers"], (b"content-security-policy", self.POLICY)]
            await send(event)

        await self.app(scope, replay, send_with_policy)


# -------------------------------------------------------------------------------------------- OpenAI's interface


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(Decoding):
    """A request of OpenAI's chat interface; ``top_k`` and ``num_beams`` are our own. Other fields are ignored."""

    messages: list[Message]
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(None, ge=1)  # the newer name of max_tokens
    n: Any = 1
    stop: Any = None
    tools: Any = None
    logprobs: Any = False

    @field_validator("n", "stop", "tools", "logprobs")
    @classmethod
    def another_kind_of_answer(cls, value: object) -> object:
        if value not in (None, 1, False, []):
            raise ValueError("not offered here, leave it out")
        return value

    def conversation(self) -> tuple[list[str], list[str]]:
        """The personality, from the system messages, and what was said, the user's first: several messages of one side
        are one. Raises `InputError` unless the user spoke last."""
        personality, said, speaker = [], [""], "user"
        for message in self.messages:
            if message.role in ("system", "developer"):
                personality += sentences(message.text)
            elif message.role == speaker:
                said[-1] = f"{said[-1]} {message.text}".strip()
            else:
                said.append(message.text)
                speaker = message.role
        if speaker != "user" or not said[-1].strip():
            raise InputError("messages: the last one must be the user's, and say something")
        return personality, said if said[0] else said[1:]


def error(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    """An error as OpenAI's clients expect it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status,
                        headers={"Retry-After": "5"} if status == 503 else None)


def openai_routes(app: FastAPI, bot: Bot) -> None:
    """``/v1/models`` and ``/v1/chat/completions``."""
    model = {"id": bot.name, "object": "model", "created": int(time.time()), "owned_by": "transfertransfo",
             "version": bot.version}

    @app.get("/v1/models")
    def models() -> dict:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", response_model=None)
    def one_model(name: str) -> dict | JSONResponse:
        return model if name == bot.name else no_such_model(name)

    def no_such_model(name: str) -> JSONResponse:
        return error(404, f"There is no model {name!r} here, only {bot.name!r}.", "model_not_found", "model")

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(asked: ChatRequest, request: Request):
        if asked.model not in ("", bot.name):
            return no_such_model(asked.model)
        asked.max_tokens = asked.max_completion_tokens or asked.max_tokens
        replies = bot.reply(*asked.conversation(), asked)
        frame = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": bot.name,
                 "system_fingerprint": bot.version}
        reply = await anext(replies)  # what can be wrong with the request is found out here
        if asked.stream:
            with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
            events = stream(bot, reply, replies, frame | {"object": "chat.completion.chunk"}, with_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        async with aclosing(replies):
            async for reply in replies:  # noqa: B007  the last one is the whole
                if await request.is_disconnected():  # who is gone needs no answer
                    return Response()
        message = {"role": "assistant", "content": bot.text(reply)}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish}
        return frame | {"object": "chat.completion", "choices": [choice], "usage": usage(reply)}

    @app.api_route("/v1/{rest:path}", methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)
    def anything_else(rest: str) -> JSONResponse:
        return error(404, f"/v1/{rest} is not offered here; /v1/chat/completions and /v1/models are.")


async def stream(bot: Bot, reply: Reply, replies: AsyncIterator[Reply], frame: dict, with_usage: bool):
    """A reply as server-sent events. ``replies`` go on behind ``reply``."""

    def event(delta: dict, finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return f"data: {json.dumps(frame | {'choices': [choice]})}\n\n"

    async with aclosing(replies):
        yield event({"role": "assistant", "content": ""})
        sent = ""
        try:
            while True:
                finish, text = reply.finish, bot.text(reply)  # in this order: the last token may come in between
                if not finish:  # the last word may change yet, and draw nearer: "do", "don't"
                    text = text[:max(text.rfind(" "), 0)]
                if len(text) > len(sent):
                    yield event({"content": text[len(sent):]})
                    sent = text
                if finish:
                    break
                reply = await anext(replies)
        except RuntimeError as problem:
            yield f"data: {error(500, str(problem)).body.decode()}\n\n"
            return
    yield event({}, finish)
    if with_usage:
        yield f"data: {json.dumps(frame | {'choices': [], 'usage': usage(reply)})}\n\n"
    yield "data: [DONE]\n\n"


def usage(reply: Reply) -> dict[str, int]:
    """Tokens read and written, control tokens included."""
    read, written = len(reply.context.ids) + 1, len(reply.tokens) + (reply.finish == "stop")
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


# ------------------------------------------------------------------------------------------------------ the server


def build_app(bot: Bot, table: TokenTable) -> FastAPI:
    """Everything at one address."""
    app = FastAPI(title="TransferTransfo", version=bot.version, docs_url=None, redoc_url=None)
    app.add_middleware(Guard)

    @app.exception_handler(RequestValidationError)
    def not_understood(request: Request, problem: RequestValidationError) -> JSONResponse:
        first = problem.errors()[0]
        param = ".".join(map(str, first["loc"][1:])) or "body"
        if first["type"] == "json_invalid":
            return error(400, f"The body is not JSON at character {param} ({first['ctx']['error']}).", "invalid_json")
        return error(400, f"{param}: {first['msg'].removeprefix('Value error, ')}", "invalid_value", param)

    @app.exception_handler(HTTPException)
    def refused(request: Request, problem: HTTPException) -> JSONResponse:
        return error(problem.status_code, str(problem.detail))

    @app.exception_handler(InputError)
    def not_usable(request: Request, problem: InputError) -> JSONResponse:
        return error(400, str(problem), "invalid_value")

    @app.exception_handler(Busy)
    def busy(request: Request, problem: Busy) -> JSONResponse:
        return error(503, str(problem), "queue_full")

    @app.exception_handler(Exception)
    def failed(request: Request, problem: Exception) -> JSONResponse:
        return error(500, str(problem))

    @app.get("/healthz")
    def health() -> JSONResponse:
        decoder = bot.decoder
        alive = decoder.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "not decoding", "model": bot.name, "version": bot.version,
                             "decoding": len(decoder.decoding), "waiting": len(decoder.waiting)}, 200 if alive else 503)

    openai_routes(app, bot)
    return gr.mount_gradio_app(app, build_page(bot, table), path="/", theme=THEME, css=STYLE, head=HEAD, ssr_mode=False,
                               run_history=False, footer_links=["api"])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises `InputError` when it cannot."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(1024)
        return listening
    except PermissionError:
        raise InputError(f"--port {port}: only the administrator may use it; choose one above 1023") from None
    except socket.gaierror as problem:
        raise InputError(f"--host {host}: no such host ({problem.strerror}); 127.0.0.1 is for this machine alone, "
                         "0.0.0.0 for all who can reach it") from None
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            raise InputError(f"--port {port}: in use by another program; choose another one, or 0 for any free one"
                             ) from None
        raise InputError(f"--host {host}: cannot be listened at ({problem.strerror}); 127.0.0.1 is for this machine "
                         "alone, 0.0.0.0 for all who can reach it") from None


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="Decoding flags are what the page begins with, "
                            "and what programs get that ask for nothing else.")
    add = parser.add_argument
    add_common_flags(parser, model_checkpoint="")
    add_decoding_flags(parser)
    add("--host", default="127.0.0.1",
        help="address to listen at; 0.0.0.0 lets other machines in (default: %(default)s)")
    add("--port", type=port_number, default=7860, help="0: any free one (default: %(default)s)")
    add("--max_batch", type=positive_number, default=32, metavar="N",
        help="replies decoded at once; a beam search counts as its beams and one (default: %(default)s)")
    add("--max_waiting", type=positive_number, default=64, metavar="N",
        help="requests that may wait for their turn; more are refused (default: %(default)s)")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    with listen(args.host, args.port) as listening:  # before the model is loaded, which can take long
        args.model_checkpoint = published_or_persona(args.model_checkpoint)
        bot = Bot(args)
        app = build_app(bot, dataset_of(args, bot.tokenizer))
        host, port = listening.getsockname()[:2]
        print(f"Open http://{f'[{host}]' if ':' in host else host}:{port} in a browser; Ctrl-C ends.", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)).run([listening])
        bot.decoder.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    for library in ("httpx", "asyncio"):
        logging.getLogger(library).setLevel(logging.WARNING)
    command(main)
