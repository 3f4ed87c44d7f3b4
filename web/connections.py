"""The server under the requests: connections that do not hang, and an end that lets replies end.

Uvicorn does the rest. This file knows neither routes nor models.
"""

import asyncio
import errno
import resource
import socket
import time
from collections.abc import Callable

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cli import InputError

HEAD_TIME = 20  # s, in which a request's head must have come
HEAD_SIZE = 64 * 1024  # bytes of it
READ_TIME = 30  # s, in which a client must take what it is sent
MOST_WAITING = 512  # connections of which nothing whole has come; of more the oldest are closed
SPARE = 100  # files that the process may need beside its connections


class Connection(HttpToolsProtocol):
    """A connection that is closed when its client neither asks nor reads, or sends a head without end."""

    waiting: dict["Connection", None] = {}  # for something whole, the longest first

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.in_head, self.head, self.timer, self.stuck = True, 0, None, None
        self._wait()
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE
        if len(self.waiting) > MOST_WAITING or len(self.connections) > most:
            next(iter(self.waiting)).transport.abort()

    def _wait(self) -> None:
        if self.timer is None:
            self.timer = self.loop.call_later(HEAD_TIME, self.transport.abort)
            self.waiting[self] = None

    def _go_on(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
            self.waiting.pop(self, None)

    def on_message_begin(self) -> None:
        self.in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.in_head:
            self.head = 0
        elif (size := self.head + len(data)) > HEAD_SIZE:
            self.transport.abort()
        else:
            self.head = size
        if self.in_head or self.cycle.response_complete:  # what comes behind an answer is waited for as a head is
            self._wait()
        else:
            self._go_on()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stuck = self.stuck or self.loop.call_later(READ_TIME, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stuck:
            self.stuck.cancel()
            self.stuck = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._go_on()
        super().connection_lost(exc)
        if self.stuck:
            self.stuck.cancel()


class Server(uvicorn.Server):
    """Uvicorn's server; a first SIGTERM or Ctrl-C lets it go on with what it is doing for so many ``seconds``.

    ``drain`` is called then, once, to refuse whatever else comes; ``idle`` says whether all is done, ``end`` ends what
    is not, and then ``stopping`` is set, for what has no end. A second signal ends at once. ``signal``: the first one's
    number, None before.
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
            await asyncio.sleep(0.2)  # s, for the last words of what was ended
            self.stopping.set()
        return await super().on_tick(counter)


def allow_many_files() -> None:
    """As many open files, and so connections, as this process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


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
