"""An engine that runs for a test, and clients that read documents with it."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from gma.service.engine.document import Document
from gma.service.engine.engine import Engine
from gma.service.engine.observer import Ending, Observer
from gma.service.engine.opening import Opening, Tokens
from gma.service.engine.progress import Progress, RowShares
from tests.service.engine.counting import CHUNK, CountingRunner, answer

TEST_S = 30

at_any_depth = pytest.mark.parametrize("depth", [1, 2])


class Witness(Observer):
    """Remembers what the engine told."""

    def __init__(self) -> None:
        self.waiting = self.slots = self.pages = 0
        self.refusals = self.failures = self.spoilt = 0
        self.rows = self.paid = 0
        self.tokens = self.seconds = 0.0
        self.admissions: list[float] = []
        self.ended: list[tuple[Ending, int]] = []
        self._steps = asyncio.Semaphore(0)

    def occupancy(self, waiting: int, slots: int, pages: int) -> None:
        self.waiting, self.slots, self.pages = waiting, slots, pages

    def refused(self) -> None:
        self.refusals += 1

    def admitted(self, seconds: float) -> None:
        self.admissions.append(seconds)

    def stepped(self, rows: int, grid_rows: int, tokens: float, seconds: float) -> None:
        self.rows += rows
        self.paid += grid_rows
        self.tokens += tokens
        self.seconds += seconds
        self._steps.release()

    def step_failed(self) -> None:
        self.failures += 1
        self._steps.release()

    def not_finite(self) -> None:
        self.spoilt += 1

    def closed(self, how: Ending, tokens: int) -> None:
        self.ended.append((how, tokens))

    async def step_ended(self) -> None:
        """One more than was waited for before, and its documents were told."""
        await self._steps.acquire()


@asynccontextmanager
async def running(
    runner: CountingRunner, witness: Witness | None = None, **options: Any
) -> AsyncIterator[Engine]:
    """An engine, stopped at the end; then every slot and page must have come back."""
    witness = witness or Witness()
    options = {"max_waiting": 64, "inbox_tokens": 64, "idle_timeout_s": 1e6, **options}
    engine = Engine(runner, observer=witness, **options)
    async with asyncio.timeout(TEST_S):
        await engine.start()
        try:
            yield engine
        finally:
            runner.resume()
            await engine.stop()
    assert (witness.waiting, witness.slots, witness.pages) == (0, 0, 0), "every place came back"


def opening(
    tokens: Tokens,
    *,
    last: bool = True,
    name: str = "a",
    evidence: bool = True,
    running: bool = True,
    components: bool = False,
) -> Opening:
    return Opening(name, tokens, last, evidence, running, components)


async def feed(document: Document, pieces: Sequence[Tokens]) -> None:
    """Feed a document all that is left of it."""
    for number, piece in enumerate(pieces, 1):
        await document.feed(piece, last=number == len(pieces))


async def rest(document: Document) -> list[Progress]:
    """All Progress that is still to come."""
    return [progress async for progress in document]


async def exchange(document: Document, pieces: Sequence[Tokens]) -> list[Progress]:
    """Feed a document all that is left of it while listening, and close it in any case."""
    feeding = asyncio.create_task(feed(document, pieces))
    try:
        progress = await rest(document)
        await feeding
    finally:
        document.close()
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
    return progress


async def read(
    engine: Engine, *pieces: Tokens, name: str = "a", evidence: bool = True
) -> list[Progress]:
    """Read a document that comes in pieces, of which the last says that it is the last."""
    first, *others = pieces
    document = engine.open(opening(first, last=not others, name=name, evidence=evidence))
    return await exchange(document, others)


async def settle() -> None:
    """Let everything happen that can happen while the compute thread is idle or paused."""
    for _ in range(20):
        await asyncio.sleep(0)


def cut(tokens: Tokens, rng: random.Random) -> list[Tokens]:
    at = sorted(rng.choices(range(len(tokens) + 1), k=rng.randrange(6)))
    return np.split(tokens, at)


def shares_of(progress: Sequence[Progress]) -> RowShares:
    """What all rows said."""
    return RowShares.joined([each.shares for each in progress if each.shares])


def check(progress: Sequence[Progress], tokens: Tokens) -> None:
    """Hold what was told of a document, with its evidence, to the exact answer."""
    final, shares = progress[-1], shares_of(progress)
    assert [each.done for each in progress] == [False] * (len(progress) - 1) + [True]
    assert final.logits.tolist() == answer(tokens)
    assert final.tokens == len(tokens)
    assert final.chunks == len(shares.tokens)
    sizes = [CHUNK] * (len(tokens) // CHUNK) + [len(tokens) % CHUNK] * (len(tokens) % CHUNK > 0)
    assert shares.tokens.tolist() == sizes, "cut by length alone"
    assert [part.dtype for part in shares] == [np.int32, np.float64, np.float32]
    evidence = shares.evidence.sum(0, dtype=np.float64)
    assert (evidence / shares.weight.sum()).tolist() == answer(tokens)
