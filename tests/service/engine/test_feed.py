"""Feeding a document."""

import asyncio
from typing import Any

import numpy as np
import pytest

from gma.service.errors import Empty, StepFailed, UnknownDocument
from tests.service.engine.counting import (
    CHUNK,
    NO_TOKENS,
    OVERFLOWS,
    CountingRunner,
    tokens_of,
)
from tests.service.engine.reading import check, feed, opening, read, rest, running, settle

pytestmark = pytest.mark.anyio


async def test_feeding_waits_while_more_is_queued_than_may_be() -> None:
    runner, tokens = CountingRunner(), tokens_of(300)
    async with running(runner, inbox_tokens=40) as engine:
        runner.pause()
        document = engine.open(opening(tokens[:16], last=False))
        await runner.until_in_step()
        await document.feed(tokens[16:56], last=False)
        assert engine.queue().tokens == 40
        feeding = asyncio.create_task(document.feed(tokens[56:], last=True))
        await settle()
        assert engine.queue().tokens == 284, "they are taken at once"
        assert not feeding.done()
        runner.resume()
        check(await rest(document), tokens)
        await feeding


async def test_a_partial_chunk_waits_for_more_or_for_the_end() -> None:
    runner = CountingRunner()
    async with running(runner) as engine:
        document = engine.open(opening(tokens_of(CHUNK - 1), last=False))
        check(await read(engine, tokens_of(5)), tokens_of(5))
        assert sum(batch.lengths.sum() for batch in runner.steps) == 5
        await document.feed(NO_TOKENS, last=True)
        check(await rest(document), tokens_of(CHUNK - 1))


async def test_nothing_follows_the_last_tokens() -> None:
    runner = CountingRunner()
    async with running(runner) as engine:
        runner.pause()
        document = engine.open(opening(tokens_of(9)))
        for last in (True, False):
            await document.feed(NO_TOKENS, last=last)
            with pytest.raises(ValueError, match="complete"):
                await document.feed(tokens_of(1), last=last)
        runner.resume()
        check(await rest(document), tokens_of(9))
        await document.feed(NO_TOKENS, last=True)
        with pytest.raises(ValueError, match="complete"):
            await document.feed(tokens_of(1), last=True)


@pytest.mark.parametrize(
    "wrong", [np.array([1000]), np.array([-1]), np.array([0.5]), np.array(5), np.zeros((2, 2), int)]
)
async def test_tokens_that_are_none_are_refused_and_change_nothing(wrong: Any) -> None:
    tokens = tokens_of(30)
    async with running(CountingRunner()) as engine:
        document = engine.open(opening(tokens[:10], last=False))
        with pytest.raises(ValueError, match="tokens must be"):
            await document.feed(wrong, last=True)
        await document.feed(tokens[10:], last=True)
        check(await rest(document), tokens)


async def test_a_document_that_ends_empty_is_an_error() -> None:
    async with running(CountingRunner()) as engine:
        document = engine.open(opening(NO_TOKENS, last=False))
        await document.feed(NO_TOKENS, last=False)
        for _ in range(2):
            with pytest.raises(Empty):
                await document.feed(NO_TOKENS, last=True)
        with pytest.raises(Empty):
            await rest(document)


@pytest.mark.parametrize("how", ["close", "overflow"])
async def test_a_feeder_that_waits_hears_what_closed_its_document(how: str) -> None:
    runner = CountingRunner()
    async with running(runner, inbox_tokens=CHUNK) as engine:
        runner.pause()
        first = np.full(4, OVERFLOWS if how == "overflow" else 0, np.int32)
        document = engine.open(opening(first, last=False))
        await runner.until_in_step()
        feeding = asyncio.create_task(document.feed(tokens_of(400), last=True))
        listening = asyncio.create_task(rest(document))
        await settle()
        assert not feeding.done()
        if how == "close":
            document.close()
        runner.resume()
        error = UnknownDocument if how == "close" else StepFailed
        for task in (feeding, listening):
            with pytest.raises(error):
                await task
        with pytest.raises(error):
            await document.feed(tokens_of(1), last=True)


async def test_a_feeder_that_gives_up_waiting_has_fed_its_tokens() -> None:
    runner, tokens = CountingRunner(), tokens_of(120)
    async with running(runner, inbox_tokens=CHUNK) as engine:
        runner.pause()
        document = engine.open(opening(tokens[:40], last=False))
        feeding = asyncio.create_task(document.feed(tokens[40:80], last=False))
        await settle()
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        runner.resume()
        await feed(document, [tokens[80:]])
        check(await rest(document), tokens)
