"""Starting and stopping."""

import asyncio

import pytest

from gma.service.engine.engine import Engine
from gma.service.engine.observer import Observer
from gma.service.errors import NotReady, ServiceError, ShuttingDown
from tests.service.engine.counting import CHUNK, CountingRunner, tokens_of
from tests.service.engine.reading import check, opening, rest, running, settle

pytestmark = pytest.mark.anyio


async def test_stopping_ends_the_running_step_and_fails_the_rest() -> None:
    runner = CountingRunner(slots=1)
    async with running(runner, inbox_tokens=CHUNK) as engine:
        runner.pause()
        last_step = engine.open(opening(tokens_of(3)))
        await runner.until_in_step()
        ready = engine.open(opening(tokens_of(99)))
        fed = engine.open(opening(tokens_of(1), last=False))
        feeding = asyncio.create_task(fed.feed(tokens_of(99), last=False))
        await settle()
        stopping = asyncio.create_task(engine.stop())
        await settle()
        assert not stopping.done()
        assert not engine.ready
        with pytest.raises(ShuttingDown, match="elsewhere"):
            engine.open(opening(tokens_of(3)))
        runner.resume()
        await stopping
        check(await rest(last_step), tokens_of(3))
        for failing in (rest(ready), rest(fed), feeding, fed.feed(tokens_of(1), last=True)):
            with pytest.raises(ShuttingDown, match="again"):
                await failing
        ready.close()


async def test_a_failed_warm_up_is_not_served() -> None:
    class Broken(CountingRunner):
        def warm_up(self) -> None:
            raise RuntimeError("weights are not finite")

    engine = Engine(Broken(), max_waiting=1, inbox_tokens=CHUNK, idle_timeout_s=1)
    with pytest.raises(RuntimeError, match="not finite"):
        await engine.start()
    assert not engine.ready
    with pytest.raises(NotReady):
        engine.open(opening(tokens_of(3)))
    await engine.stop()


async def test_an_observer_that_raises_ends_the_engine_and_nobody_waits_for_ever() -> None:
    class Broken(Observer):
        def stepped(self, rows: int, grid_rows: int, tokens: float, seconds: float) -> None:
            raise ZeroDivisionError

    engine = Engine(
        CountingRunner(), max_waiting=9, inbox_tokens=CHUNK, idle_timeout_s=1, observer=Broken()
    )
    await engine.start()
    document = engine.open(opening(tokens_of(99)))
    async with asyncio.timeout(9):
        with pytest.raises(ServiceError):
            await rest(document)
    assert not engine.ready
    with pytest.raises(ShuttingDown):
        engine.open(opening(tokens_of(3)))
    with pytest.raises(ZeroDivisionError):
        await engine.stop()
