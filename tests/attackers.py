"""Send requests without a pause, whatever the answers; attack.py runs this in its own process.

    python tests/attackers.py ADDRESS CLIENTS BODY [--keys each] [--seconds S]

The script prints the number of good replies. Its clients speak HTTP over bare sockets, which costs little computing.
"""

import argparse
import asyncio
import contextlib
import math
import re
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


async def attack(host: str, port: int, clients: int, body: bytes, keys: str, seconds: float) -> int:
    good, end = 0, time.monotonic() + seconds

    async def client(number: int) -> None:
        nonlocal good
        request = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                   f"Authorization: Bearer {number if keys == 'each' else keys}\r\nContent-Length: {len(body)}\r\n\r\n"
                   ).encode() + body
        while time.monotonic() < end:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_connection(host, port, limit=1 << 24)
                with contextlib.closing(writer):
                    while time.monotonic() < end:
                        whole = await ask(reader, writer, request)
                        good += whole

    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    await asyncio.wait(tasks, timeout=None if seconds == math.inf else seconds)
    for task in tasks:  # replies still in progress do not count
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="HOST:PORT")
    parser.add_argument("clients", type=int)
    parser.add_argument("body", help="the request's JSON")
    parser.add_argument("--keys", default="crowd", help="API key, or 'each' for one per client (default: crowd)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="default: until it is stopped")
    args = parser.parse_args()
    host, _, port = args.address.partition(":")
    print(asyncio.run(attack(host, int(port), args.clients, args.body.encode(), args.keys, args.seconds)))


if __name__ == "__main__":
    main()
