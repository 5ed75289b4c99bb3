"""What a session costs: an append to a long one, and appends beside one-shot posts.

    python -m benchmarks.sessions
    python -m benchmarks.sessions --tiny

starts the service, its store a folder of this machine's disk, for which every append waits. First a
session of 10 MB and one that begins empty get the same pieces of 1 KB, in turns. Then several
clients at once append 1 KB each to sessions of their own, or post them as documents, in turns.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import aiohttp

from benchmarks.processes import service
from benchmarks.random_models import tiny_checkpoint
from benchmarks.timing import markdown, progress
from gma.loadtest.report import Latency

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "agreement.txt"

PIECE = 1024
UPLOAD = 2**20
"""Bytes of one append while a session is made long."""

PLAIN = {"content-type": "text/plain"}


class Sizes(NamedTuple):
    """How much is measured."""

    long_bytes: int = 10_000_000
    appends: int = 100
    """To each of both, after a quarter as many that are not counted."""
    at_once: int = 8
    seconds: float = 5.0
    """Of a turn."""
    rounds: int = 5


QUICK = Sizes(long_bytes=20_000, appends=4, at_once=2, seconds=0.2, rounds=2)


class Session:
    """One on the service, and the text that goes on in it."""

    def __init__(self, http: aiohttp.ClientSession, text: bytes) -> None:
        self._http = http
        self._bytes = cycle(text)
        self._path = ""
        self._offset = 0

    async def begin(self) -> None:
        async with self._http.post("/v1/sessions") as response:
            self._path = f"/v1/sessions/{(await response.json())['id']}"

    async def append(self, size: int = PIECE) -> None:
        """Raises aiohttp.ClientError, as everything does that asks the service."""
        headers = {**PLAIN, "upload-offset": str(self._offset)}
        piece = bytes(islice(self._bytes, size))
        async with self._http.patch(self._path, data=piece, headers=headers) as response:
            self._offset = (await response.json())["offset"]

    async def end(self) -> None:
        await (await self._http.delete(self._path)).read()


class Length(NamedTuple):
    """Seconds of each append of 1 KB."""

    long: list[float]
    empty: list[float]

    @property
    def ratio(self) -> float:
        return median(self.long) / median(self.empty)


class Turn(NamedTuple):
    """Seconds of each request of one way, and of all of them."""

    taken: list[float]
    seconds: float


Turns = dict[str, list[Turn]]
"""By way: "appends" and "posts"."""


async def by_length(http: aiohttp.ClientSession, text: bytes, sizes: Sizes) -> Length:
    """Append the same to a long session and to one that began empty, in turns."""
    long, empty = Session(http, text), Session(http, text)
    await long.begin()
    await empty.begin()
    for start in range(0, sizes.long_bytes, UPLOAD):
        await long.append(min(UPLOAD, sizes.long_bytes - start))
        progress(f"{start / 1e6:.0f} MB of {sizes.long_bytes / 1e6:g}")
    found = Length([], [])
    both = [*zip((long, empty), found, strict=True)]
    for _ in range(sizes.appends + sizes.appends // 4):
        both.reverse()  # who comes first may have it harder
        for session, taken in both:
            began = time.perf_counter()
            await session.append()
            taken.append(time.perf_counter() - began)
    await long.end()
    await empty.end()
    return Length(*(taken[sizes.appends // 4 :] for taken in found))


async def side_by_side(http: aiohttp.ClientSession, text: bytes, sizes: Sizes) -> Turns:
    """Let clients append, then post, then append again, so many times."""
    sessions = [Session(http, text) for _ in range(sizes.at_once)]
    for session in sessions:
        await session.begin()
    pieces = cycle([text[n : n + PIECE] for n in range(0, len(text) - PIECE, PIECE)])

    async def append(client: int) -> None:
        await sessions[client].append()

    async def post(_: int) -> None:
        async with http.post("/v1/documents", data=next(pieces), headers=PLAIN) as response:
            await response.read()

    ways: dict[str, Callable[[int], Awaitable[None]]] = {"appends": append, "posts": post}
    for call in ways.values():
        await _turn(call, sizes.at_once, min(1.0, sizes.seconds))
    found: Turns = {way: [] for way in ways}
    for _ in range(sizes.rounds):
        for way, call in ways.items():
            found[way].append(await _turn(call, sizes.at_once, sizes.seconds))
    for session in sessions:
        await session.end()
    return found


async def _turn(call: Callable[[int], Awaitable[None]], at_once: int, seconds: float) -> Turn:
    taken: list[float] = []
    began = time.perf_counter()

    async def client(number: int) -> None:
        while (before := time.perf_counter()) < began + seconds:
            await call(number)
            taken.append(time.perf_counter() - before)

    await asyncio.gather(*map(client, range(at_once)))
    return Turn(taken, time.perf_counter() - began)


def ratio(turns: Turns) -> float:
    """Appends a second as a part of posts a second: the median of all rounds."""
    rounds = zip(turns["appends"], turns["posts"], strict=True)
    return median(_rate(one) / _rate(other) for one, other in rounds)


def _rate(turn: Turn) -> float:
    return len(turn.taken) / turn.seconds


def length_table(found: Length, sizes: Sizes) -> str:
    """The report of `by_length`, as Markdown."""
    long, empty = (f"{median(each) * 1e3:.1f} ms" for each in found)
    rows = [
        [f"append 1 KB to {sizes.long_bytes / 1e6:g} MB", long, f"{found.ratio:.2f}"],
        ["append 1 KB to one that began empty", empty, ""],
    ]
    return markdown(["", "median", "to the other"], rows)


def rate_table(turns: Turns, sizes: Sizes) -> str:
    """The report of `side_by_side`, as Markdown."""
    rows = []
    for way, found in turns.items():
        latency = Latency.of([each for turn in found for each in turn.taken])
        assert latency
        quantiles = [f"{latency.quantiles[name] * 1e3:.1f} ms" for name in ("p50", "p99")]
        rate = f"{median(map(_rate, found)):.1f}"
        of_posts = f"{ratio(turns):.2f}" if way == "appends" else ""
        rows.append([f"{way} of 1 KB, {sizes.at_once} at once", rate, *quantiles, of_posts])
    return markdown(["", "a second", "p50", "p99", "of posts"], rows)


async def measure(url: str, sizes: Sizes) -> AsyncIterator[str]:
    """Ask a service that keeps sessions, and give the reports."""
    text = EXAMPLE.read_bytes()
    limits: Any = {"timeout": aiohttp.ClientTimeout(total=None), "raise_for_status": True}
    async with aiohttp.ClientSession(url, **limits) as http:
        if sizes.long_bytes:
            yield length_table(await by_length(http, text, sizes), sizes)
        if sizes.rounds:
            yield rate_table(await side_by_side(http, text, sizes), sizes)


@contextmanager
def running(url: str | None, *, tiny: bool) -> Iterator[str]:
    """The URL of a service: this one, or one of its own, whose model may be next to nothing."""
    if url:
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="gma-") as folder:
        settings: dict[str, object] = {"sessions": Path(folder) / "sessions"}
        if tiny:
            settings["checkpoint"] = Path(folder) / "checkpoint"
            tiny_checkpoint(Path(folder) / "checkpoint")
        with service(log_level="WARNING", **settings) as found:
            yield found.url


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", help="of a service that runs, in place of one of its own")
    parser.add_argument("--tiny", action="store_true", help="a model whose work is next to nothing")
    parser.add_argument(
        "--megabytes", type=float, default=Sizes().long_bytes / 1e6, help="0: no long session"
    )
    parser.add_argument("--at-once", type=int, default=Sizes().at_once)
    parser.add_argument("--rounds", type=int, default=Sizes().rounds, help="0: no posts")
    parser.add_argument("--quick", action="store_true", help="small: shows that it runs, no more")
    options = parser.parse_args(argv)
    sizes = QUICK if options.quick else Sizes(
        long_bytes=int(options.megabytes * 1e6), at_once=options.at_once, rounds=options.rounds
    )  # fmt: skip
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}\n")
    with running(options.url, tiny=options.tiny) as url:
        asyncio.run(tell(url, sizes))


async def tell(url: str, sizes: Sizes) -> None:
    """Print each report when it is there."""
    async for report in measure(url, sizes):
        print(report)


if __name__ == "__main__":
    main()
