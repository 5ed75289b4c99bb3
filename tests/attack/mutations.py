"""Requests with mistakes, and clients that leave, in any number.

    python -m tests.attack.mutations --requests 20000 --disconnects 10000

Each request is an honest one in which some bytes were changed, and comes in random segments. No
answer may be an error of the service's own, honest documents between them are answered rightly,
and memory is in the end what it was after the first tenth.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.attack.client import Raw, Reply
from tests.attack.honest import DOCUMENT, HONEST, LARGE, PROBE, SIZE, head
from tests.attack.target import Target, target

HONEST_EVERY = 25
MORE_MEMORY = 1.05
"""What memory may grow by from the first tenth to the end."""

CHUNKED = "Transfer-Encoding: chunked"
CHUNKS = b"%x\r\n%b\r\n0\r\nx-more: 1\r\n\r\n" % (len(DOCUMENT), DOCUMENT)
JSON = b'{"text": "a short text", "top_k": 2, "evidence": true}'
REQUESTS = (
    HONEST,
    PROBE,
    LARGE,
    HONEST + PROBE + HONEST,
    head(CHUNKED) + CHUNKS,
    head(SIZE, "Connection: Upgrade", "Upgrade: h2c") + DOCUMENT,
    head(SIZE, "Accept: application/x-ndjson", path="/v1/documents?top_k=2&evidence=1") + DOCUMENT,
    head(f"Content-Length: {len(JSON)}").replace(b"text/plain", b"application/json") + JSON,
)
PIECES = (
    b"\r\n", b"\n", b"\x00", b" ", b":", b"\r\n\r\n", b"0\r\n\r\n", b"ffffffffffffffff\r\n",
    b"Content-Length: 1\r\n", b"Content-Length: 18446744073709551616\r\n", b"\r\n folded",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n", b"Expect: 100-continue\r\n",
    b"Connection: close\r\n", b"Upgrade: websocket\r\n", b"HTTP/1.0", b"HTTP/9.9", b"%00", b"?",
    b"Content-Encoding: gzip\r\n", b"\xef\xbb\xbf", b"\xff\xfe", b"{" * 99, b"\\ud800",
    b"a" * 40_000,
)  # fmt: skip


def mutated(request: bytes, chance: random.Random) -> bytes:
    """The request with some mistakes."""
    for _ in range(chance.randint(1, 3)):
        # Most of what matters stands in front.
        at = min(chance.randrange(len(request) + 1), chance.randrange(len(request) + 1))
        to = at + chance.randint(0, 20)
        new = chance.choice((b"", request[at:to] * 2, chance.randbytes(3), *PIECES))
        request = request[:at] + new + request[to if chance.random() < 0.5 else at :]
    return request


def send(client: Raw, request: bytes, chance: random.Random) -> None:
    """In some segments. The service need not take all of it."""
    cuts = sorted(chance.randrange(len(request) + 1) for _ in range(chance.randint(0, 4)))
    with suppress(ConnectionError):
        for begin, end in zip([0, *cuts], [*cuts, len(request)], strict=True):
            client.send(request[begin:end])


def ask(port: int, chance: random.Random) -> Counter[int]:
    """Send one request with mistakes; the answers' statuses."""
    found: Counter[int] = Counter()
    with Raw(port) as client:
        request = mutated(chance.choice(REQUESTS), chance)
        send(client, request, chance)
        with suppress(OSError):  # it may have been closed
            client.end()
        while reply := client.reply():
            assert allowed(reply), f"{request!r} was answered {reply}: {reply.body!r}"
            found[reply.status] += 1
    return found


def allowed(reply: Reply) -> bool:
    """Whether the answer tells of no mistake of the service's own."""
    if reply.status == 501:
        return bool(reply.json()["error_type"] == "UnknownTransferCoding")
    return reply.status < 500 or (reply.status == 503 and "retry-after" in reply.headers)


def leave(port: int, chance: random.Random) -> Counter[int]:
    """Send a part of an honest request, and be gone, in one of the ways there are."""
    request = chance.choice(REQUESTS)
    with Raw(port) as client:
        send(client, request[: chance.randint(0, len(request))], chance)
        if chance.random() < 0.5:
            client.reset_on_close()
    return Counter()


def repeat(
    attacked: Target, act: Callable[[int, random.Random], Counter[int]], times: int, seed: int
) -> Counter[int]:
    """Act so many times, with honest documents between; the answers' statuses, counted.

    Raises AssertionError if an answer is not allowed, or an honest one not right.
    """
    chance, port = random.Random(seed), attacked.port()
    found: Counter[int] = Counter()
    for number in range(times):
        found += act(port, chance)
        if number % HONEST_EVERY == 0:
            attacked.check_answer(port)
    attacked.check(port)
    return found


def resident_bytes() -> int:
    """Of this process, in which both sides are."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--disconnects", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, target(Path(folder)) as attacked:
        for act, times in ((ask, arguments.requests), (leave, arguments.disconnects)):
            repeat(attacked, act, times // 10, arguments.seed)
            before = resident_bytes()
            found = repeat(attacked, act, times - times // 10, arguments.seed + 1)
            grown = resident_bytes() / before
            sys.stdout.write(
                f"{act.__name__}: {times}, answers {dict(sorted(found.items()))}, "
                f"memory {before / 2**20:.0f} MiB, times {grown:.3f} in the end\n"
            )
            if grown > MORE_MEMORY:
                raise SystemExit("memory has grown")


if __name__ == "__main__":
    main()
