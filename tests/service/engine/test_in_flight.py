"""Two steps in flight. What is launched, and when, shows in the steps' tokens."""

import asyncio

import pytest

from gma.service.engine.pace import LEAD_S
from tests.service.engine.counting import (
    CHUNK,
    FULL,
    ROWS,
    Clock,
    DeviceRunner,
    marked,
    marks,
    tokens_of,
)
from tests.service.engine.reading import (
    Witness,
    at_any_depth,
    check,
    opening,
    rest,
    running,
    settle,
)

pytestmark = pytest.mark.anyio


async def test_a_lone_long_document_is_in_two_steps_at_once() -> None:
    runner, tokens = DeviceRunner(), tokens_of(3 * FULL + 1)
    async with running(runner) as engine:
        told = aiter(engine.open(opening(tokens)))
        await runner.until_launched(2)
        runner.end_step()
        progress = [await anext(told)]
        await runner.until_launched(1)
        for _ in range(3):
            runner.end_step()
            progress.append(await anext(told))
        assert [each.tokens for each in progress] == [FULL, 2 * FULL, 3 * FULL, 3 * FULL + 1]
        check(progress, tokens)


@at_any_depth
async def test_steps_in_flight_are_no_more_than_the_runners_depth(depth: int) -> None:
    runner = DeviceRunner(depth=depth)
    async with running(runner) as engine:
        book = engine.open(opening(marked(1, 4 * ROWS)))
        await runner.until_launched(depth)
        late = engine.open(opening(marked(2, 1)))
        await settle()
        runner.resume()
        await asyncio.gather(rest(book), rest(late))
    assert [2 in marks(batch) for batch in runner.steps].index(True) == depth


async def test_a_step_that_is_not_full_waits_for_the_running_one_and_takes_in_who_comes() -> None:
    runner = DeviceRunner()
    async with running(runner) as engine:
        first = engine.open(opening(marked(1, ROWS + 1)))
        await runner.until_launched(1)
        second = engine.open(opening(marked(2, 1)))
        await settle()
        runner.resume()
        await asyncio.gather(rest(first), rest(second))
    assert [sorted(marks(batch)) for batch in runner.steps] == [[1] * ROWS, [1, 2]]


async def test_a_step_that_becomes_full_waits_no_longer() -> None:
    runner = DeviceRunner()
    async with running(runner) as engine:
        first = engine.open(opening(marked(1, ROWS + 1)))
        await runner.until_launched(1)
        second = engine.open(opening(marked(2, ROWS - 1)))
        await runner.until_launched(1)
        assert sorted(marks(runner.steps[1])) == [1] + [2] * (ROWS - 1)
        assert len(runner.in_flight) == 2
        runner.resume()
        await asyncio.gather(rest(first), rest(second))


async def test_a_full_step_is_launched_behind_another_only_when_that_is_about_to_end() -> None:
    clock, witness = Clock(), Witness()
    runner = DeviceRunner(clock=clock)
    async with running(runner, witness, clock=clock) as engine:
        book = engine.open(opening(marked(1, 4 * ROWS)))
        await runner.until_launched(2)  # nobody knows yet how long they last
        runner.end_step()  # 1 s after its launch
        await witness.step_ended()
        await settle()
        assert len(runner.steps) == 2
        late = engine.open(opening(marked(2, 1)))
        await settle()
        assert len(runner.steps) == 2
        clock.now += 1 - LEAD_S / 2
        later = engine.open(opening(marked(3, 1)))
        await runner.until_launched(1)
        assert {2, 3} <= {*marks(runner.steps[2])}
        runner.resume()
        await asyncio.gather(*map(rest, (book, late, later)))


async def test_a_document_that_is_closed_before_its_first_step_has_no_rows_in_it() -> None:
    runner, witness = DeviceRunner(slots=3), Witness()
    async with running(runner, witness) as engine:
        first = engine.open(opening(marked(1, ROWS)))
        await runner.until_launched(1)
        closed, second = (engine.open(opening(marked(mark, 1))) for mark in (2, 3))
        await settle()
        assert witness.slots == 3
        closed.close()
        assert witness.slots == 2, "no step has rows of it"
        runner.resume()
        check(await rest(first), marked(1, ROWS))
        check(await rest(second), marked(3, 1))
    assert [marks(batch) for batch in runner.steps] == [[1] * ROWS, [3]]


async def test_a_slot_that_is_given_back_starts_afresh_behind_the_step_that_runs() -> None:
    """The slot of a document whose last step ended, while another's step is in flight."""
    runner, witness = DeviceRunner(slots=2), Witness()
    async with running(runner, witness) as engine:
        first = engine.open(opening(marked(1, ROWS)))
        await runner.until_launched(1)
        book = engine.open(opening(marked(2, 3 * ROWS)))
        waiting = engine.open(opening(marked(3, 1)))
        await runner.until_launched(1)
        assert (witness.waiting, witness.slots) == (1, 2)
        runner.end_step()
        check(await rest(first), marked(1, ROWS))
        assert (witness.waiting, witness.slots) == (0, 2)
        runner.resume()
        check(await rest(waiting), marked(3, 1))
        check(await rest(book), marked(2, 3 * ROWS))


async def test_stopping_ends_both_steps_in_flight_and_launches_no_other() -> None:
    runner, witness = DeviceRunner(), Witness()
    async with running(runner, witness) as engine:
        book = engine.open(opening(marked(1, 9 * ROWS)))
        await runner.until_launched(2)
        stopping = asyncio.create_task(engine.stop())
        for _ in range(2):
            await settle()
            assert not stopping.done()
            assert not book.closed
            runner.end_step()
            await witness.step_ended()
        await stopping
        assert len(runner.steps) == 2
    assert witness.ended == [("failed", 2 * ROWS * CHUNK)]


async def test_a_document_whose_last_rows_are_in_flight_at_the_stop_gets_its_answer() -> None:
    runner = DeviceRunner()
    async with running(runner) as engine:
        ending = engine.open(opening(tokens_of(2 * FULL)))
        await runner.until_launched(2)
        stopping = asyncio.create_task(engine.stop())
        await settle()
        runner.resume()
        await stopping
        check(await rest(ending), tokens_of(2 * FULL))
