"""Talk to a model in the browser, or from a program through OpenAI's interface or Gradio's, at one address.

    python demo.py --model_checkpoint runs/<your run>

The replies of all visitors are decoded in one batch (web/batching.py). The page is in web/page.py, the interface for
programs in web/api.py; this file starts the server.
"""

import asyncio
import gc
import logging
import re
import socket
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from contextlib import suppress
from functools import partial
from ipaddress import ip_address, ip_network

try:
    import gradio as gr
except ModuleNotFoundError:  # an optional package: training and chat do not need it
    print("demo.py: error: the page needs gradio; pip install -r requirements/web.txt", file=sys.stderr)
    sys.exit(2)
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection

from cli import InputError, command, port_number, positive_number, whole_number
from decoding import add_decoding_flags
from pretrained import published_or_persona
from tables import TokenTable
from utils import add_common_flags, open_dataset, other_data
from web.api import PARAMETERS, client_of, openai_routes
from web.batching import MEMORY, Busy, apart
from web.bot import Bot
from web.collecting import Collector
from web.connections import Connection, Server, allow_many_files, listen
from web.events import check
from web.guard import Delays, Guard, Paced, error
from web.page import HEAD, THEME, build_page

logger = logging.getLogger("demo")


# ------------------------------------------------------------------------------------------------------ the server


def build_app(bot: Bot, table: TokenTable, hosts: list[str], origins: list[str],
              collector: Collector | None = None, pairing: str = "") -> FastAPI:
    """Build the application: the page, the interfaces for programs, and the checks before them.

    ``hosts``: host names that requests may use; others are refused, so that no other site can let a name of its own
    point here (DNS rebinding). ``origins``: sites whose scripts may send requests.
    """
    app = FastAPI(title="TransferTransfo", version=bot.version, docs_url=None, redoc_url=None, openapi_url=None)
    page = build_page(bot, table, collector, pairing)
    # The middleware added last runs first. Gradio has its own CORS rules, which allow every page on this machine, and
    # leaves them out only if it finds Starlette's. Without origins, `Guard` answers before those are reached.
    cors = dict(allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    if not origins:
        app.add_middleware(CORSMiddleware, **cors)

    def refuses(connection: HTTPConnection) -> object | None:
        """Return the reason why a request for a reply is refused now, or None."""
        if connection.url.path.startswith("/gradio_api/") and (reason := page._queue.refuses(connection.client)):
            return reason
        return bot.decoder.refuses(client_of(connection))

    app.state.stopping = asyncio.Event()
    delays = Delays(app.state.stopping)
    app.add_middleware(Guard, check=partial(check, page), busy=refuses, delays=delays)
    if origins:
        app.add_middleware(CORSMiddleware, **cors)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    app.add_middleware(Paced, delays=delays)

    @app.exception_handler(RequestValidationError)
    def not_understood(request: Request, problem: RequestValidationError) -> JSONResponse:
        first = problem.errors()[0]
        if first["loc"] == ("body",) and "json" not in request.headers.get("content-type", ""):
            return error(400, "The request does not say that it is JSON; send the header Content-Type: "
                         "application/json.", "not_json")
        param = ".".join(map(str, first["loc"][1:])) or "body"
        if first["type"] == "json_invalid":
            return error(400, f"The body is not JSON at character {param} ({first['ctx']['error']}).", "invalid_json")
        return error(400, f"{param}: {first['msg'].removeprefix('Value error, ')}", "invalid_value", param)

    @app.exception_handler(HTTPException)
    def refused(request: Request, problem: HTTPException) -> JSONResponse:
        return error(problem.status_code, str(problem.detail))

    @app.exception_handler(InputError)
    def not_usable(request: Request, problem: InputError) -> JSONResponse:
        message = str(problem).replace("max_length:", "max_tokens:", 1)
        param = message.partition(":")[0]
        return error(400, message, "invalid_value", param if param in PARAMETERS else None)

    @app.exception_handler(Busy)
    def busy(request: Request, problem: Busy) -> JSONResponse:
        return error(503, str(problem), "queue_full")

    @app.exception_handler(Exception)
    def failed(request: Request, problem: Exception) -> JSONResponse:
        return error(500, str(problem))

    @app.get("/healthz")
    def health() -> JSONResponse:
        """Report the server's state, with status 200 only if requests for a reply are answered or queued."""
        decoder, events = bot.decoder, page._queue
        silent = time.monotonic() - decoder.stepped if decoder.decoding else 0
        status = ("stopping" if decoder.draining else "not decoding" if not decoder.thread.is_alive() or silent > 60
                  else "page out of order" if events.stopped else "ok")
        return JSONResponse({
            "status": status, "model": bot.name, "version": bot.version, "decoding": len(decoder.decoding),
            "waiting": len(decoder.waiting), "full": bool(decoder.refuses()), "page_events": events.under_way,
            "page_events_full": events.under_way >= events.most,
            "memory_mib": decoder.cache.bytes >> 20, "kept_mib": decoder.cache.kept_bytes >> 20,
            "memory_allowed_mib": decoder.memory >> 20,
            "seconds_since_last_step": round(silent, 1)}, 200 if status == "ok" else 503)

    openai_routes(app, bot)
    return gr.mount_gradio_app(app, page, path="/", theme=THEME, head=HEAD, ssr_mode=False,
                               run_history=False, footer_links=[])


def host_names(host: str, further: list[str]) -> list[str]:
    """Return the host names of a server that listens at ``host``, including this machine's if others may connect."""
    names = ["localhost", "127.0.0.1", "::1", host, *further]
    if host in ("0.0.0.0", "::", ""):
        own = socket.gethostname()
        names.append(own)
        with suppress(OSError):
            names += [str(place[0]) for *_, place in socket.getaddrinfo(own, None)]
    return [f"[{name}]" if ":" in name else name for name in dict.fromkeys(names)]


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="The decoding flags set the first values on "
                            "the page, and the defaults for programs.")
    add = parser.add_argument
    add_common_flags(parser, model_checkpoint="")
    add_decoding_flags(parser)
    add("--host", default="127.0.0.1",
        help="address to listen at; 0.0.0.0 lets other machines in (default: %(default)s)")
    add("--port", type=port_number, default=7860, help="0: any free one (default: %(default)s)")
    add("--max_batch", type=positive_number, default=32, metavar="N",
        help="replies decoded at once; a beam search counts as the number of beams plus one (default: %(default)s)")
    add("--max_waiting", type=positive_number, default=64, metavar="N",
        help="requests that may wait; further ones are refused (default: %(default)s)")
    add("--memory", type=positive_number, default=MEMORY, metavar="MIB",
        help="memory for the keys and values of all replies under way; a request that needs more than is free waits "
             "(default: %(default)s)")
    add("--drain", type=whole_number, default=30, metavar="S",
        help="seconds that replies under way may still take after SIGTERM or Ctrl-C (default: %(default)s)")
    add("--allow_host", action="append", default=[], metavar="NAME", type=_host,
        help="another host name of this server, such as a proxy's; *.NAME allows all its subdomains; repeatable "
             "(default: this machine's names and --host)")
    add("--allow_origin", action="append", default=[], metavar="ORIGIN", type=_origin,
        help="allow requests from scripts of other sites: https://name[:port], or * for all; repeatable "
             "(default: none)")
    add("--proxy", action="append", default=[], metavar="ADDRESS", type=_network,
        help="address or network of a proxy before this server, which is believed about its visitors' addresses "
             "(X-Forwarded-For); repeatable (default: none, so that all its visitors count as one address)")
    add("--collect", metavar="FOLDER",
        help="save visitors' preferences, with the conversations, as pairs, answers and ratings for feedback/; the "
             "page tells visitors (default: nothing is saved)")
    return parser.parse_args(argv)


def main() -> int:
    args = parse_args()
    sys.setswitchinterval(0.001)  # s: many requests delay the decoding thread less
    allow_many_files()
    with listen(args.host, args.port) as listening:  # before the slow loading of the model, to fail early
        args.model_checkpoint = published_or_persona(args.model_checkpoint)
        bot, collector, table = asyncio.run(apart(load, args))
        if pairing := other_data(args):
            logger.warning(pairing)
        app = build_app(bot, table, host_names(args.host, args.allow_host), args.allow_origin, collector, pairing)
        gc.collect()  # later collections, which stop all replies, need not look at model and libraries again
        gc.freeze()
        host, port = listening.getsockname()[:2]
        print(f"Open http://{f'[{host}]' if ':' in host else host}:{port} in a browser; stop with Ctrl-C.", flush=True)
        server = serve(bot, app, args.drain, args.proxy)
        server.run([listening])
        return 128 + server.signal if server.signal else 0


def load(args: Namespace) -> tuple[Bot, Collector | None, TokenTable]:
    """Load the model, and the data that suggestions and personas come from."""
    bot = Bot(args)
    return bot, Collector(args.collect, bot) if args.collect else None, open_dataset(args, bot.tokenizer)


def serve(bot: Bot, app: FastAPI, drain: float, proxies: list[str]) -> Server:
    """Return a server of ``app`` that, after a signal, finishes replies under way for at most ``drain`` seconds.

    ``proxies``: addresses and networks that may name the addresses of their visitors.
    """
    config = uvicorn.Config(app, http=Connection, ws="none", proxy_headers=bool(proxies),
                            forwarded_allow_ips=proxies, log_level="warning", timeout_graceful_shutdown=3,
                            timeout_keep_alive=30)
    return Server(config, drain, bot.decoder.drain, lambda: not bot.decoder.decoding, bot.decoder.close,
                  app.state.stopping)


def _host(text: str) -> str:
    if not re.fullmatch(r"(\*\.)?[\w.-]+|[0-9a-fA-F:]+", text):
        raise ArgumentTypeError(f"{text!r} is not a host name; write it without scheme and port: chat.example.org")
    return text


def _network(text: str) -> str:
    try:
        return str(ip_network(text) if "/" in text else ip_address(text))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not an address; write a number, as 10.0.0.1 or 10.0.0.0/8") from None


def _origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", text):
        raise ArgumentTypeError(f"{text!r} is not an origin; write scheme, host and port: https://chat.example.org")
    return text


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    for library in ("httpx", "asyncio"):
        logging.getLogger(library).setLevel(logging.WARNING)
    command(main)
