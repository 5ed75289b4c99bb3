"""Closing a document, whatever it is at."""

import asyncio
import gc
import weakref

import numpy as np
import pytest

from gma.service.errors import StepFailed, UnknownDocument
from tests.service.engine.counting import (
    CHUNK,
    FULL,
    OVERFLOWS,
    CountingRunner,
    DeviceRunner,
    tokens_of,
)
from tests.service.engine.reading import Witness, check, opening, read, rest, running, settle

pytestmark = pytest.mark.anyio


async def test_while_nobody_listens() -> None:
    witness = Witness()
    async with running(CountingRunner(), witness) as engine:
        document = engine.open(opening(tokens_of(CHUNK), last=False))
        await witness.step_ended()
        document.close()
        assert (witness.slots, witness.ended) == (0, [("aborted", CHUNK)])
        with pytest.raises(UnknownDocument, match="a was aborted"):
            await rest(document)
        with pytest.raises(UnknownDocument):
            await document.feed(tokens_of(1), last=True)


async def test_while_somebody_listens() -> None:
    async with running(CountingRunner()) as engine:
        document = engine.open(opening(tokens_of(1), last=False))
        listening = asyncio.create_task(rest(document))
        await settle()
        document.close()
        with pytest.raises(UnknownDocument):
            await listening


async def test_while_it_waits_for_a_slot() -> None:
    runner, witness = CountingRunner(slots=1), Witness()
    async with running(runner, witness) as engine:
        runner.pause()
        first, second, third = (engine.open(opening(tokens_of(9, i))) for i in range(3))
        second.close()
        assert (witness.waiting, witness.slots) == (1, 1)
        runner.resume()
        check(await rest(first), tokens_of(9, 0))
        check(await rest(third), tokens_of(9, 2))


async def test_in_a_step_it_keeps_its_slot_until_that_ends() -> None:
    runner, witness = CountingRunner(slots=1), Witness()
    async with running(runner, witness) as engine:
        runner.pause()
        document = engine.open(opening(tokens_of(99)))
        await runner.until_in_step()
        document.close()
        with pytest.raises(UnknownDocument):
            await rest(document)
        following = engine.open(opening(tokens_of(50)))
        assert (witness.waiting, witness.slots) == (1, 1)
        runner.resume()
        check(await rest(following), tokens_of(50))
    assert witness.ended == [("aborted", 0), ("done", 50)]


async def test_in_two_steps_it_keeps_its_slot_until_both_ended() -> None:
    runner, witness = DeviceRunner(slots=1), Witness()
    async with running(runner, witness) as engine:
        document = engine.open(opening(tokens_of(5 * FULL)))
        await runner.until_launched(2)
        document.close()
        for slots in (1, 0):
            runner.end_step()
            await witness.step_ended()
            assert witness.slots == slots
        assert len(runner.steps) == 2
        runner.resume()
        check(await read(engine, tokens_of(50)), tokens_of(50))


async def test_twice_is_once() -> None:
    runner, witness = DeviceRunner(slots=1), Witness()
    async with running(runner, witness) as engine:
        document = engine.open(opening(tokens_of(99)))
        await runner.until_launched(2)
        document.close()
        document.close()
        runner.resume()
        await witness.step_ended()
        await witness.step_ended()
        document.close()
        assert (witness.slots, witness.ended) == (0, [("aborted", 0)])
        check(await read(engine, tokens_of(50)), tokens_of(50))


async def test_what_is_done_is_not_closed_again_and_still_tells_its_answer() -> None:
    witness = Witness()
    async with running(CountingRunner(), witness) as engine:
        document = engine.open(opening(tokens_of(9)))
        await witness.step_ended()
        document.close()
        check(await rest(document), tokens_of(9))
    assert witness.ended == [("done", 9)]


async def test_whoever_stops_listening_can_close_it() -> None:
    witness = Witness()
    async with running(CountingRunner(), witness) as engine:
        document = engine.open(opening(tokens_of(99), last=False))
        async for _ in document:
            break
        document.close()
        document.close()
        await settle()
        with pytest.raises(UnknownDocument):
            await document.feed(tokens_of(1), last=True)


@pytest.mark.parametrize("how", ["done", "closed", "failed"])
async def test_what_closed_it_is_told_as_often_as_it_is_asked(how: str) -> None:
    async with running(CountingRunner()) as engine:
        tokens = np.array([OVERFLOWS], np.int32) if how == "failed" else tokens_of(9)
        document = engine.open(opening(tokens))
        if how == "closed":
            document.close()
        for _ in range(3):
            if how == "done":
                final = (await rest(document))[-1]
                assert (final.done, final.tokens) == (True, 9)
            else:
                with pytest.raises(UnknownDocument if how == "closed" else StepFailed):
                    await rest(document)


@pytest.mark.parametrize("how", ["done", "closed", "failed"])
async def test_the_engine_keeps_nothing_of_it(how: str) -> None:
    async with running(CountingRunner()) as engine:
        tokens = np.array([OVERFLOWS], np.int32) if how == "failed" else tokens_of(99)
        document = engine.open(opening(tokens))
        if how == "closed":
            document.close()
        await asyncio.gather(rest(document), return_exceptions=True)
        await settle()
        kept = weakref.ref(document)
        del document
        gc.collect()
        assert kept() is None
