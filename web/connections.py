"""Extend uvicorn's server: close connections that hang, and let replies finish before the server ends.

This file knows neither routes nor models.
"""

import asyncio
import errno
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cli import InputError
from web.clients import Client

HEAD_TIME = 20  # s within which the whole head of a request must arrive
HEAD_SIZE = 64 * 1024  # bytes of a head at most
READ_TIME = 30  # s within which a client must read what it is sent
MOST_WAITING = 512  # connections without a complete request head; beyond, one is closed
SPARE = 100  # files that the process may need besides its connections


class Connection(HttpToolsProtocol):
    """A connection that is closed when its client sends no request, does not read, or sends an endless head."""

    waiting: dict["Connection", None] = {}  # connections that wait for a request's head, the oldest first

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.in_head, self.head, self.timer, self.stuck = True, 0, None, None
        self.address = Client.at(self.client[0] if self.client else "").address
        self._wait()
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE
        if len(self.waiting) > MOST_WAITING or len(self.connections) > most:
            crowd = Counter(one.address for one in self.waiting)  # the oldest of the address with the most
            max(self.waiting, key=lambda one: crowd[one.address]).transport.abort()

    def _wait(self) -> None:
        if self.timer is None:
            self.timer = self.loop.call_later(HEAD_TIME, self.transport.abort)
            self.waiting[self] = None

    def _stop_waiting(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
            self.waiting.pop(self, None)

    def on_message_begin(self) -> None:
        self.in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()  # raises an error if the URL is malformed
        self.in_head = False

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.in_head:
            self.head = 0
        elif (size := self.head + len(data)) > HEAD_SIZE:
            self.transport.abort()
        else:
            self.head = size
        if self.in_head or self.cycle.response_complete:  # after an answer, the next head is awaited
            self._wait()
        else:
            self._stop_waiting()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stuck = self.stuck or self.loop.call_later(READ_TIME, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stuck:
            self.stuck.cancel()
            self.stuck = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)
        if self.stuck:
            self.stuck.cancel()


class Server(uvicorn.Server):
    """Uvicorn's server, which after a first SIGTERM or Ctrl-C finishes its replies for at most ``seconds``.

    At the first signal the server calls ``drain``, which refuses new requests. When ``idle`` returns True or the time
    is over, it calls ``end``, which ends the remaining replies, and sets ``stopping``, which ends endless answers. A
    second signal ends the server at once. ``signal``: the number of the first signal, None before it.
    """

    def __init__(self, config: uvicorn.Config, seconds: float, drain: Callable[[], None], idle: Callable[[], bool],
                 end: Callable[[], None], stopping: asyncio.Event):
        super().__init__(config)
        self.seconds, self.drain, self.idle, self.end, self.stopping = seconds, drain, idle, end, stopping
        self.signal: int | None = None
        self.deadline: float | None = None

    def handle_exit(self, sig: int, frame) -> None:
        if self.signal is None:
            self.signal = sig
        else:
            self.deadline = 0

    async def on_tick(self, counter: int) -> bool:
        if self.signal is not None and self.deadline is None:
            self.deadline = time.monotonic() + self.seconds
            self.drain()
        if self.deadline is not None and (self.idle() or time.monotonic() > self.deadline):
            self.should_exit = True
        if self.should_exit:
            await asyncio.to_thread(self.end)
            await asyncio.sleep(0.2)  # s, for sending the ends of the replies
            self.stopping.set()
        return await super().on_tick(counter)


def allow_many_files() -> None:
    """Raise the limit of open files, and so of connections, to the highest that this process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at the address. Raises `InputError` if that is impossible."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With the protocol named, asyncio sends small packets at once; otherwise they wait 40 ms for Nagle's algorithm.
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(1024)
        return listening
    except PermissionError:
        raise InputError(f"--port {port}: only the administrator may use this port; choose one above 1023") from None
    except socket.gaierror as problem:
        raise InputError(f"--host {host}: no such host ({problem.strerror}); 127.0.0.1 lets only this machine in, "
                         "0.0.0.0 also others") from None
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            raise InputError(f"--port {port}: another program uses this port; choose another one, or 0 for any free one"
                             ) from None
        raise InputError(f"--host {host}: the server cannot listen there ({problem.strerror}); 127.0.0.1 lets only "
                         "this machine in, 0.0.0.0 also others") from None
