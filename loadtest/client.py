"""One client process: it sends documents at their times, or so many at once, and notes each answer.

    python -m gma.loadtest.client PLAN OUT

PLAN is a JSON file. It says `ready` on its output when its corpus is read, waits for the time of
the beginning (of the monotonic clock, which a machine's processes share) on its input, and writes
one JSON line for each document to OUT.
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp

from gma.loadtest.corpus import Corpus

MOST_CONNECTIONS = 900
"""How many a process has open; it usually may open 1,024 files. Documents that are due beyond them
wait, and their time runs."""

ROUTE = "/v1/documents"
NDJSON = "application/x-ndjson"


@dataclass(frozen=True)
class Plan:
    """What one client process does."""

    url: str
    corpus: str | None  # a file
    lengths: str | None
    seed: int
    first: int  # its documents are first, first + step, ...
    step: int
    dues: Sequence[float]  # of an open loop: seconds from the beginning
    at_once: int  # documents in flight of a closed loop, or 0
    seconds: float  # that a closed loop goes on
    ndjson: bool
    timeout_s: float
    key: str | None = None


@dataclass
class Outcome:
    """What became of one document. Times are seconds from the beginning."""

    due: float  # in a closed loop, when it was sent
    bytes: int
    sent: float = 0.0
    first: float | None = None  # when the answer's first line was there
    ended: float = 0.0
    tokens: int = 0
    timing_ms: dict[str, float] = field(default_factory=dict)
    error: str | None = None  # its kind

    @property
    def seconds(self) -> float:
        """From when it was due, not from when it was sent: waiting to be sent is waiting."""
        return self.ended - self.due


class AnswerError(Exception):
    """An answer that does not answer the document; the message is its kind."""


class Client:
    """Sends a plan's documents."""

    def __init__(self, plan: Plan, corpus: Corpus) -> None:
        self._plan = plan
        self._corpus = corpus
        headers = {"Content-Type": "text/plain; charset=utf-8"}
        headers |= {"Accept": NDJSON} if plan.ndjson else {}
        headers |= {"Authorization": f"Bearer {plan.key}"} if plan.key else {}
        self._headers = headers

    async def run(self, begin: float) -> list[Outcome]:
        """Send every document of the plan. `begin` is a time of the monotonic clock, in seconds."""
        async with aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(),  # none: each document has one time to be answered in
            connector=aiohttp.TCPConnector(limit=MOST_CONNECTIONS),
        ) as self._http:
            if self._plan.at_once:
                return await self._closed_loop(begin)
            return await self._open_loop(begin)

    async def _open_loop(self, begin: float) -> list[Outcome]:
        """Each document at its time, whether or not those before are answered."""
        async with asyncio.TaskGroup() as tasks:
            sent: list[asyncio.Task[Outcome]] = []
            for i, due in enumerate(self._plan.dues):
                body = self._document(i)  # made before its time
                await asyncio.sleep(begin + due - time.monotonic())
                sent.append(tasks.create_task(self._send(body, begin, due)))
        return [each.result() for each in sent]

    async def _closed_loop(self, begin: float) -> list[Outcome]:
        """Each of so many senders sends its next document when its last is answered."""
        outcomes: list[Outcome] = []
        numbers = count()

        async def one_after_the_other() -> None:
            await asyncio.sleep(begin - time.monotonic())
            while True:
                body = self._document(next(numbers))
                now = time.monotonic() - begin
                if now >= self._plan.seconds:
                    return
                outcomes.append(await self._send(body, begin, now))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._plan.at_once):
                tasks.create_task(one_after_the_other())
        return outcomes

    def _document(self, i: int) -> bytes:
        return self._corpus.document(self._plan.first + i * self._plan.step)

    async def _send(self, body: bytes, begin: float, due: float) -> Outcome:
        outcome = Outcome(due, len(body), sent=time.monotonic() - begin)
        try:
            async with asyncio.timeout(begin + due + self._plan.timeout_s - time.monotonic()):
                await self._answer(outcome, body, begin)
        except TimeoutError:
            outcome.error = "timeout"
        except AnswerError as error:
            outcome.error = str(error)
        except aiohttp.ClientConnectorError:
            outcome.error = "connection refused"
        except aiohttp.ClientError as error:
            outcome.error = type(error).__name__
        outcome.ended = time.monotonic() - begin
        return outcome

    async def _answer(self, outcome: Outcome, body: bytes, begin: float) -> None:
        url = f"{self._plan.url.rstrip('/')}{ROUTE}"
        async with self._http.post(url, params={"top_k": 1}, data=io.BytesIO(body)) as response:
            if response.status != 200:
                await response.read()
                raise AnswerError(str(response.status))
            answer: Any = None
            async for line in _lines(response, self._plan.ndjson):
                if outcome.first is None:
                    outcome.first = time.monotonic() - begin
                answer = line
        _check(answer, len(body), self._plan.ndjson)
        outcome.tokens = answer["usage"]["tokens"]
        outcome.timing_ms = answer.get("timing_ms", {})


async def _lines(response: aiohttp.ClientResponse, ndjson: bool) -> AsyncIterator[Any]:
    """Yield the answer, or each of its events. Raises AnswerError if it is not JSON."""
    try:
        if not ndjson:
            yield json.loads(await response.read())
            return
        async for line in response.content:
            if line.strip():
                yield json.loads(line)
    except ValueError as error:
        raise AnswerError("not JSON") from error


def _check(answer: Any, size: int, ndjson: bool) -> None:
    """Check that this answers the whole document; raises AnswerError if it does not."""
    if ndjson and isinstance(answer, dict) and answer.get("event") == "error":
        raise AnswerError(f"event: {answer.get('error_type')}")
    try:
        read = answer["usage"]["bytes"]
        whole = isinstance(answer["usage"]["tokens"], int)
    except (KeyError, TypeError):
        raise AnswerError("no answer") from None
    if read != size or not whole:
        raise AnswerError("not all was read")


def main(plan_file: Path, out: Path) -> None:
    plan = Plan(**json.loads(plan_file.read_text(encoding="utf-8")))
    file = None if plan.corpus is None else Path(plan.corpus)
    try:
        corpus = Corpus.load(file, plan.lengths, plan.seed)
    except (OSError, ValueError) as error:
        sys.exit(f"loadtest: {error}")
    client = Client(plan, corpus)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    begin = float(sys.stdin.readline())
    outcomes = asyncio.run(client.run(begin))
    lines = (json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)
    with out.open("w", encoding="utf-8") as opened:
        opened.writelines(lines)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main(Path(sys.argv[1]), Path(sys.argv[2]))
