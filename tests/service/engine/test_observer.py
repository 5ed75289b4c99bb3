"""What the engine reports: to each client of its document, to an observer of all."""

import numpy as np
import pytest

from gma.service.errors import StepFailed
from tests.service.engine.counting import (
    CHUNK,
    FULL,
    RAISES,
    ROWS,
    Clock,
    CountingRunner,
    DeviceRunner,
    marked,
    tokens_of,
)
from tests.service.engine.reading import Witness, opening, read, rest, running

pytestmark = pytest.mark.anyio


async def test_time_in_the_queue_and_in_steps() -> None:
    clock = Clock()
    runner, witness = CountingRunner(rows=1, clock=clock), Witness()
    async with running(runner, witness, clock=clock) as engine:
        runner.pause()
        first = engine.open(opening(tokens_of(2 * CHUNK)))
        await runner.until_in_step()
        second = engine.open(opening(tokens_of(2 * CHUNK)))
        runner.resume()
        final = (await rest(first))[-1]
        assert (final.wait_s, final.queue_s, final.compute_s) == (0, 1, 2)
        final = (await rest(second))[-1]
        assert (final.wait_s, final.queue_s, final.compute_s) == (1, 2, 2)
        assert witness.seconds == 4


async def test_time_in_steps_that_overlap_counts_once_and_waiting_behind_one_is_queueing() -> None:
    clock, witness = Clock(), Witness()  # each step takes a second
    runner = DeviceRunner(clock=clock)
    async with running(runner, witness, clock=clock) as engine:
        book = engine.open(opening(marked(1, 2 * ROWS + 2)))
        await runner.until_launched(2)
        mate = engine.open(opening(marked(2, ROWS - 2)))
        for _ in range(3):
            runner.end_step()
            await witness.step_ended()
        final = (await rest(book))[-1]
        assert (final.queue_s, final.compute_s) == (0, 3)
        final = (await rest(mate))[-1]
        assert (final.queue_s, final.compute_s) == (2, 1)
        assert witness.seconds == 3


async def test_what_comes_while_its_document_is_read_does_not_count_as_queueing() -> None:
    clock = Clock()  # each step takes a second, and the second one waits for the client too
    runner = DeviceRunner(clock=clock)
    async with running(runner, clock=clock) as engine:
        document = engine.open(opening(marked(1, 2 * ROWS), last=False))
        told = aiter(document)
        await runner.until_launched(2)
        runner.end_step()
        await anext(told)
        clock.now += 1
        await document.feed(marked(1, 1), last=True)
        runner.resume()
        *_, final = [each async for each in told]
        assert (final.queue_s, final.compute_s) == (0, 4)


async def test_what_waits_now() -> None:
    clock, runner = Clock(), CountingRunner(slots=1)
    async with running(runner, clock=clock) as engine:
        assert engine.queue() == (0, 0)
        runner.pause()
        first = engine.open(opening(tokens_of(FULL + 3)))
        await runner.until_in_step()
        partial = engine.open(opening(tokens_of(1), last=False))
        clock.now = 5
        assert engine.queue() == (4, 0), "nobody with a chunk ready waits for a slot"
        ready = engine.open(opening(tokens_of(9)))
        clock.now = 7
        assert engine.queue() == (13, 2)
        partial.close()
        assert engine.queue() == (12, 2)
        runner.resume()
        await rest(first)
        await rest(ready)
        assert engine.queue() == (0, 0)


async def test_observers_are_told_everything_once() -> None:
    runner, witness = CountingRunner(slots=1), Witness()
    async with running(runner, witness) as engine:
        await read(engine, tokens_of(3 * CHUNK))
        assert (witness.tokens, witness.rows, witness.paid) == (3 * CHUNK, 3, 4)
        with pytest.raises(StepFailed):
            await read(engine, np.array([RAISES], np.int32))
        resident = engine.open(opening(tokens_of(CHUNK), last=False))
        waiting = engine.open(opening(tokens_of(1), last=False))
        await anext(aiter(resident))
        assert (witness.waiting, witness.slots) == (1, 1)
        resident.close()
        waiting.close()
        assert (witness.waiting, witness.slots) == (0, 0)
    assert witness.ended == [
        ("done", 3 * CHUNK),
        ("failed", 0),
        ("aborted", CHUNK),
        ("aborted", 0),
    ]
    assert (witness.failures, len(witness.admissions)) == (1, 3)
