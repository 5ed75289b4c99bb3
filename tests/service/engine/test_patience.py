"""Clients that do nothing, and ones that the engine keeps waiting."""

import pytest

from gma.service.engine.engine import Engine
from gma.service.errors import Stalled
from tests.service.engine.counting import CHUNK, Clock, CountingRunner, tokens_of
from tests.service.engine.reading import Witness, check, opening, read, rest, running

pytestmark = pytest.mark.anyio


async def see(engine: Engine) -> None:
    """Any document's work makes the engine look at the clock."""
    await read(engine, tokens_of(1))


async def test_a_client_that_sends_nothing_more_is_dropped() -> None:
    clock, witness = Clock(), Witness()
    async with running(CountingRunner(slots=2), witness, idle_timeout_s=30, clock=clock) as engine:
        resident = engine.open(opening(tokens_of(CHUNK), last=False))
        waiting = engine.open(opening(tokens_of(1), last=False))
        await witness.step_ended()
        clock.now = 20
        await see(engine)
        await waiting.feed(tokens_of(1), last=False)
        clock.now = 31
        await see(engine)
        with pytest.raises(Stalled, match="30 s"):
            await rest(resident)
        with pytest.raises(Stalled):
            await resident.feed(tokens_of(1), last=True)
        clock.now = 49
        await see(engine)
        assert not waiting.closed
        clock.now = 51
        await see(engine)
        with pytest.raises(Stalled):
            await rest(waiting)
        assert (witness.waiting, witness.slots) == (0, 0)


async def test_a_client_that_takes_nothing_more_is_dropped() -> None:
    clock = Clock()
    async with running(
        CountingRunner(), idle_timeout_s=30, clock=clock, max_unread_rows=1
    ) as engine:
        told = aiter(engine.open(opening(tokens_of(99))))
        await anext(told)
        await see(engine)
        for now in (29, 58):
            clock.now = now
            await see(engine)
            await anext(told)
            await see(engine)
        clock.now = 90
        await see(engine)
        with pytest.raises(Stalled):
            await anext(told)


@pytest.mark.parametrize("length", [9, 99])
async def test_a_client_that_the_engine_keeps_waiting_is_not_dropped(length: int) -> None:
    clock, runner = Clock(), CountingRunner(slots=1)
    async with running(runner, idle_timeout_s=30, clock=clock) as engine:
        runner.pause()
        first = engine.open(opening(tokens_of(length)))
        await runner.until_in_step()
        second = engine.open(opening(tokens_of(length)))
        clock.now = 1000
        runner.resume()
        check(await rest(first), tokens_of(length))
        check(await rest(second), tokens_of(length))


async def test_a_client_is_dropped_while_the_engine_has_nothing_to_do() -> None:
    async with running(CountingRunner(), idle_timeout_s=0.02) as engine:
        with pytest.raises(Stalled):
            await rest(engine.open(opening(tokens_of(1), last=False)))
