"""Client processes: books kept in flight, and short documents at their own times.

It imports nothing heavy: every client process imports it. Each `url` is what `/documents` follows.
Times are of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import count
from multiprocessing import get_context
from typing import NamedTuple

import httpx

PIECE_BYTES = 1 << 16
TEXT = {"Content-Type": "text/plain"}
TIMEOUT_S = 600


class Answered(NamedTuple):
    """One document: when it was due, when its answer was there, and what the answer says."""

    due: float
    ended: float
    tokens: int
    timing_ms: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.ended - self.due


async def _streamed(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), PIECE_BYTES):
        yield body[start : start + PIECE_BYTES]


async def _answered(client: httpx.AsyncClient, url: str, body: bytes, due: float) -> Answered:
    """Raises ValueError unless the service has read all of the body."""
    content = _streamed(body) if len(body) > PIECE_BYTES else body
    response = await client.post(
        f"{url}/documents", content=content, headers=TEXT, params={"top_k": 1}
    )
    if response.status_code != 200:  # httpx's own error does not pass between processes
        raise ValueError(f"{response.status_code}: {response.text}")
    answer = response.json()
    usage = answer["usage"]
    if usage["bytes"] != len(body):
        raise ValueError(f"{usage} of {len(body)} bytes")
    return Answered(due, time.monotonic(), usage["tokens"], answer["timing_ms"])


def _client(at_once: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    return httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits)


def read_books(url: str, books: Sequence[bytes], at_once: int, until: float) -> list[Answered]:
    """Keep so many books in flight, taking one after the other; none begins after `until`."""

    async def run() -> list[Answered]:
        answers: list[Answered] = []
        turn = count()
        async with _client(at_once) as client:

            async def one_after_the_other() -> None:
                while (now := time.monotonic()) < until:
                    book = books[next(turn) % len(books)]
                    answers.append(await _answered(client, url, book, now))

            async with asyncio.TaskGroup() as tasks:
                for _ in range(at_once):
                    tasks.create_task(one_after_the_other())
        return answers

    return asyncio.run(run())


def read_one_by_one(url: str, texts: Sequence[bytes]) -> list[Answered]:
    """Send each text when the one before is answered."""

    async def run() -> list[Answered]:
        async with _client(1) as client:
            return [await _answered(client, url, text, time.monotonic()) for text in texts]

    return asyncio.run(run())


def read_at(url: str, texts: Sequence[bytes], dues: Sequence[float]) -> list[Answered]:
    """Send each text at its time, whether or not the texts before are answered."""

    async def run() -> list[Answered]:
        async with _client(len(texts)) as client:

            async def one(text: bytes, due: float) -> Answered:
                await asyncio.sleep(due - time.monotonic())
                return await _answered(client, url, text, due)

            return await asyncio.gather(*map(one, texts, dues))

    return asyncio.run(run())


def poisson_times(begin: float, end: float, number: int, seed: int = 0) -> list[float]:
    """Arrivals of a Poisson process, given that exactly so many fall into this time."""
    rng = random.Random(seed)
    return sorted(rng.uniform(begin, end) for _ in range(number))


def tokens_within(answers: Sequence[Answered], begin: float, end: float) -> float:
    """Tokens read in a time window, as if each document were read evenly while it lasted."""
    return sum(
        answer.tokens * max(0.0, min(answer.ended, end) - max(answer.due, begin)) / answer.seconds
        for answer in answers
    )


class Clients:
    """Client processes, so that one client's Python does not hold up another's."""

    def __init__(self, processes: int) -> None:
        """Start so many `processes` for books, and one more for short documents."""
        self._count = processes
        self._pool = ProcessPoolExecutor(processes + 1, get_context("spawn"))

    def __enter__(self) -> Clients:
        for started in [self._pool.submit(time.sleep, 0.5) for _ in range(self._count + 1)]:
            started.result()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def books(
        self, url: str, books: Sequence[bytes], at_once: int, until: float
    ) -> list[Future[list[Answered]]]:
        """Begin `read_books`, spread over the processes."""
        shares = [at_once // self._count + (i < at_once % self._count) for i in range(self._count)]
        return [
            self._pool.submit(read_books, url, books[i :: self._count], share, until)
            for i, share in enumerate(shares)
            if share
        ]

    def one_by_one(self, url: str, texts: Sequence[bytes]) -> list[Answered]:
        """Wait for `read_one_by_one` in one process."""
        return self._pool.submit(read_one_by_one, url, texts).result()

    def at(self, url: str, texts: Sequence[bytes], dues: Sequence[float]) -> Future[list[Answered]]:
        """Begin `read_at` in one process."""
        return self._pool.submit(read_at, url, texts, dues)
