"""What a document's client is told, and when."""

import asyncio
import tracemalloc
from collections import deque

import pytest

from gma.service.engine.engine import Engine
from gma.service.errors import UnknownDocument
from tests.service.engine.counting import (
    CHUNK,
    FULL,
    ROWS,
    CountingRunner,
    answer,
    tokens_of,
)
from tests.service.engine.reading import (
    Witness,
    check,
    feed,
    opening,
    read,
    rest,
    running,
    settle,
)

pytestmark = pytest.mark.anyio

at_long_intervals = pytest.mark.parametrize(
    ("interval_s", "so_far"), [(3600, True), (0, False)], ids=["an hour", "at the end"]
)


async def test_it_comes_with_every_step_that_is_listened_to() -> None:
    tokens = tokens_of(3 * FULL)
    async with running(CountingRunner()) as engine:
        document = engine.open(opening(tokens[:FULL], last=False))
        told, progress = aiter(document), []
        for end in (2 * FULL, 3 * FULL):
            progress.append(await anext(told))
            assert progress[-1].tokens == end - FULL
            assert progress[-1].logits.tolist() == answer(tokens[: end - FULL])
            await document.feed(tokens[end - FULL : end], last=end == len(tokens))
        progress.append(await anext(told))
        with pytest.raises(StopAsyncIteration):
            await anext(told)
        check(progress, tokens)
        assert [each.chunks for each in progress] == [ROWS, 2 * ROWS, 3 * ROWS]


async def test_what_happens_while_nobody_listens_is_told_at_once() -> None:
    witness, tokens = Witness(), tokens_of(5 * FULL)
    async with running(CountingRunner(), witness) as engine:
        document = engine.open(opening(tokens[:FULL], last=False))
        told = aiter(document)
        progress = [await anext(told)]
        await feed(document, [tokens[FULL : 3 * FULL], tokens[3 * FULL :]])
        for _ in range(5):
            await witness.step_ended()
        progress += [each async for each in told]
        assert [each.tokens for each in progress] == [FULL, 5 * FULL]
        check(progress, tokens)


async def test_a_listener_that_gave_up_can_begin_again_and_misses_nothing() -> None:
    tokens = tokens_of(3 * FULL)
    async with running(CountingRunner()) as engine:
        document, progress = engine.open(opening(tokens[:FULL], last=False)), []
        async for each in document:
            progress.append(each)
            break
        impatient = asyncio.create_task(rest(document))
        await settle()
        impatient.cancel()
        await asyncio.gather(impatient, return_exceptions=True)
        await feed(document, [tokens[FULL:]])
        check(progress + await rest(document), tokens)


async def test_without_evidence_a_slow_client_holds_nothing_up() -> None:
    tokens = tokens_of(100 * CHUNK)
    async with running(CountingRunner(), max_unread_rows=6) as engine:
        told = aiter(engine.open(opening(tokens, evidence=False)))
        progress = [await anext(told)]
        for i in range(50):
            check(await read(engine, tokens_of(9, i)), tokens_of(9, i))
        progress += [each async for each in told]
        assert len(progress) == 2
        assert progress[-1].done
        assert progress[-1].logits.tolist() == answer(tokens)
        assert [each.shares for each in progress] == [None, None]


@at_long_intervals
async def test_between_the_first_and_the_last_there_is_an_interval(
    interval_s: float, so_far: bool
) -> None:
    tokens = tokens_of(100 * CHUNK)
    async with running(CountingRunner(), interval_s=interval_s) as engine:
        progress = await rest(engine.open(opening(tokens, running=so_far)))
        assert len(progress) == 2
        check(progress, tokens)


async def test_an_interval_ends() -> None:
    async with running(CountingRunner(), interval_s=0.01) as engine:
        document = engine.open(opening(tokens_of(FULL), last=False))
        told = aiter(document)
        await anext(told)
        await document.feed(tokens_of(FULL), last=False)
        assert (await anext(told)).tokens == 2 * FULL


@at_long_intervals
async def test_a_failure_does_not_wait_for_the_interval(interval_s: float, so_far: bool) -> None:
    async with running(CountingRunner(), interval_s=interval_s) as engine:
        document = engine.open(opening(tokens_of(CHUNK), last=False, running=so_far))
        told = aiter(document)
        await anext(told)
        listening = asyncio.ensure_future(anext(told))
        await settle()
        document.close()
        with pytest.raises(UnknownDocument):
            await listening


async def test_memory_does_not_grow_with_the_document() -> None:
    async def peak(engine: Engine, length: int) -> int:
        piece = tokens_of(2_000)
        tracemalloc.start()
        document = engine.open(opening(piece, last=False, evidence=False))
        feeding = asyncio.create_task(feed(document, [piece] * (length // len(piece) - 1)))
        async for _ in document:
            pass
        await feeding
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    runner = CountingRunner(chunk=64)
    runner.steps = deque(maxlen=1)
    async with running(runner, inbox_tokens=4_000) as engine:
        await peak(engine, 12_000)  # what Python allocates once
        assert await peak(engine, 120_000) < await peak(engine, 12_000) + 20_000
