"""Send requests without a pause, whatever the answers; attack.py runs this in its own process.

    python tests/attackers.py ADDRESS CLIENTS BODY [--path /v1/…] [--keys each] [--source 127.1.0.1] [--seconds S]

The script prints how many answers had status 200, and how many came in all. Its clients speak HTTP over bare sockets,
which costs little computing.
"""

import argparse
import asyncio
import contextlib
import itertools
import math
import re
import resource
import time


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> bool:
    """Send a request, read the whole answer, and return whether it was a reply."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    if length := re.search(rb"content-length: (\d+)", head):
        await reader.readexactly(int(length[1]))
    else:
        await reader.readuntil(b"0\r\n\r\n")  # the last chunk
    return b" 200 " in head.partition(b"\r\n")[0]


async def attack(host: str, port: int, args: argparse.Namespace) -> tuple[int, int]:
    good, answers, end = 0, 0, time.monotonic() + args.seconds
    requests = itertools.count()

    def request(number: int) -> bytes:
        body = args.body.replace("NUMBER", str(next(requests))).encode()
        key = number if args.keys == "each" else args.keys
        return (f"POST {args.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n").encode() + body

    async def client(number: int) -> None:
        nonlocal good, answers
        while time.monotonic() < end:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_connection(
                    host, port, limit=1 << 24, local_addr=(args.source, 0) if args.source else None)
                with contextlib.closing(writer):
                    while time.monotonic() < end:
                        whole = await ask(reader, writer, request(number))
                        good, answers = good + whole, answers + 1

    tasks = [asyncio.create_task(client(number)) for number in range(args.clients)]
    await asyncio.wait(tasks, timeout=None if args.seconds == math.inf else args.seconds)
    for task in tasks:  # replies still in progress do not count
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return good, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="HOST:PORT")
    parser.add_argument("clients", type=int)
    parser.add_argument("body", help="the request's JSON; NUMBER in it becomes the request's number")
    parser.add_argument("--path", default="/v1/chat/completions", help="default: %(default)s")
    parser.add_argument("--source", help="address to send from (default: the system chooses)")
    parser.add_argument("--keys", default="crowd", help="API key, or 'each' for one per client (default: crowd)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="default: until it is stopped")
    args = parser.parse_args()
    host, _, port = args.address.partition(":")
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    print(*asyncio.run(attack(host, int(port), args)))


if __name__ == "__main__":
    main()
