"""Which documents the engine's steps have rows of."""

import asyncio
import threading

import numpy as np
import pytest

from tests.service.engine.counting import CHUNK, CountingRunner, DeviceRunner, marked, tokens_of
from tests.service.engine.reading import opening, read, rest, running

pytestmark = pytest.mark.anyio


async def test_a_short_document_does_not_wait_for_the_books() -> None:
    runner = CountingRunner(rows=8)
    async with running(runner, inbox_tokens=4 * 8 * CHUNK) as engine:
        books = [
            engine.open(opening(tokens_of(8000, i) % 900, evidence=False, running=False))
            for i in range(4)
        ]
        await runner.until_in_step()
        for mark in range(900, 910):
            begun = len(runner.steps)
            await read(engine, marked(mark, 2))
            steps = [
                i for i, batch in enumerate(runner.steps) if (batch.tokens == mark).all(1).any()
            ]
            assert steps == [steps[0], steps[0] + 1]
            assert steps[0] <= begun + 1
        assert not any(book.closed for book in books)
        await asyncio.gather(*(rest(book) for book in books))


async def test_a_stream_of_short_documents_does_not_starve_a_book() -> None:
    async with running(CountingRunner(rows=1)) as engine:
        book = asyncio.create_task(read(engine, tokens_of(20 * CHUNK)))

        async def keep_sending() -> None:
            for _ in range(60):
                await read(engine, tokens_of(CHUNK))

        clients = [asyncio.create_task(keep_sending()) for _ in range(4)]
        done, _ = await asyncio.wait([book, *clients], return_when=asyncio.FIRST_COMPLETED)
        assert done == {book}, "its 20 rows take 100 steps, theirs 240"
        await asyncio.gather(*clients)


async def test_a_lone_short_document_takes_the_smallest_grid() -> None:
    runner = CountingRunner()
    async with running(runner) as engine:
        await read(engine, tokens_of(3))
        await read(engine, tokens_of(3 * CHUNK))
    assert [batch.tokens.shape for batch in runner.steps] == [(1, CHUNK), (4, CHUNK)]


async def test_slots_go_to_those_who_came_first() -> None:
    ended: list[int] = []

    async def follow(number: int) -> None:
        await read(engine, tokens_of(9))
        ended.append(number)

    async with running(CountingRunner(slots=1)) as engine:
        await asyncio.gather(*map(follow, range(6)))
    assert ended == [*range(6)]


async def test_a_slot_passes_over_those_who_sent_no_chunk_yet() -> None:
    runner = CountingRunner(slots=1)
    async with running(runner) as engine:
        runner.pause()
        first = engine.open(opening(marked(1, 1)))
        early = engine.open(opening(tokens_of(CHUNK - 1), last=False))
        late = engine.open(opening(marked(3, 1)))
        runner.resume()
        await asyncio.gather(rest(first), rest(late))
        await early.feed(np.full(1, 2, np.int32), last=True)
        await rest(early)
    assert [batch.tokens[0, -1] for batch in runner.steps] == [1, 3, 2]


async def test_steps_are_launched_in_the_thread_that_warmed_up_and_awaited_in_another() -> None:
    runner = DeviceRunner(held=False)
    async with running(runner) as engine:
        await asyncio.gather(*(read(engine, tokens_of(99)) for _ in range(9)))
    assert len(runner.threads) == len(runner.waiters) == 1
    assert len(runner.threads | runner.waiters | {threading.get_ident()}) == 3
