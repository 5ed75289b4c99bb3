"""Opening a document: done at once, or refused at once, without an await between."""

import asyncio
from typing import Any

import numpy as np
import pytest

from gma.service.engine.engine import Engine
from gma.service.errors import Empty, NotReady, Overloaded, UnknownDocument
from tests.service.engine.counting import CHUNK, NO_TOKENS, Clock, CountingRunner, answer, tokens_of
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


async def test_a_document_is_open_at_once() -> None:
    witness = Witness()
    async with running(CountingRunner(), witness) as engine:
        ready = engine.open(opening(tokens_of(CHUNK), last=False))
        assert (witness.waiting, witness.slots) == (0, 1)
        engine.open(opening(tokens_of(CHUNK - 1), last=False))
        assert (witness.waiting, witness.slots) == (1, 1)
        assert engine.queue().tokens == 2 * CHUNK - 1
        await ready.feed(NO_TOKENS, last=True)
        check(await rest(ready), tokens_of(CHUNK))


@pytest.mark.parametrize(
    ("tokens", "last", "error"),
    [
        (NO_TOKENS, True, Empty),
        (np.array([1000]), True, ValueError),
        (np.array([3, -1]), True, ValueError),
        (np.array([0.5]), False, ValueError),
        (np.array(5), True, ValueError),
        (np.zeros((2, 2), np.int32), False, ValueError),
        (np.zeros(0), False, ValueError),
    ],
)
async def test_what_is_no_document_is_refused_at_once_and_leaves_nothing(
    tokens: Any, last: bool, error: type[Exception]
) -> None:
    runner, witness = CountingRunner(slots=1), Witness()
    async with running(runner, witness, max_waiting=0) as engine:
        for _ in range(3):
            with pytest.raises(error):
                engine.open(opening(tokens, last=last))
        assert (witness.waiting, witness.slots, witness.refusals) == (0, 0, 0)
        check(await read(engine, tokens_of(9)), tokens_of(9))
    assert witness.ended == [("done", 9)]


async def test_beyond_the_waiting_room_documents_are_turned_away_at_once() -> None:
    runner, witness = CountingRunner(slots=1), Witness()
    async with running(runner, witness, max_waiting=1) as engine:
        runner.pause()
        documents = [engine.open(opening(tokens_of(9))) for _ in range(2)]
        with pytest.raises(Overloaded):
            engine.open(opening(tokens_of(9)))
        assert (witness.waiting, witness.slots, witness.refusals) == (1, 1, 1)
        runner.resume()
        for document in documents:
            check(await rest(document), tokens_of(9))
        check(await read(engine, tokens_of(9)), tokens_of(9))


async def test_who_is_turned_away_hears_how_long_what_waits_will_take() -> None:
    clock = Clock()  # on which every step takes a second
    runner = CountingRunner(slots=1, clock=clock)
    async with running(runner, max_waiting=1, clock=clock) as engine:
        told = []
        for before in ([], [4], [8, 8]):  # read in steps of their own
            for length in before:
                await read(engine, tokens_of(length))
            documents = [engine.open(opening(tokens_of(40))) for _ in range(2)]
            with pytest.raises(Overloaded) as refused:
                engine.open(opening(tokens_of(9)))
            told.append(refused.value.retry_after_s)
            for document in documents:
                document.close()
        # 80 tokens: at a speed that nobody knows, at 4 a second, at 4.76 a second.
        assert told == [1, 20, 17]


async def test_a_burst_no_larger_than_the_slots_waits_for_nothing() -> None:
    async with running(CountingRunner(slots=8), max_waiting=0) as engine:
        await asyncio.gather(*(read(engine, tokens_of(9)) for _ in range(8)))


async def test_before_it_is_warm_nothing_opens() -> None:
    engine = Engine(CountingRunner(), max_waiting=1, inbox_tokens=CHUNK, idle_timeout_s=1)
    with pytest.raises(NotReady):
        engine.open(opening(tokens_of(3)))
    await engine.stop()


async def test_two_documents_of_one_name_are_two_documents() -> None:
    async with running(CountingRunner()) as engine:
        short, long, closed = (
            engine.open(opening(tokens_of(length), last=False, name="same"))
            for length in (2, 20, 30)
        )
        closed.close()
        await feed(long, [tokens_of(5, seed=1)])
        await feed(short, [NO_TOKENS])
        check(await rest(short), tokens_of(2))
        check(await rest(long), np.concatenate([tokens_of(20), tokens_of(5, seed=1)]))
        with pytest.raises(UnknownDocument):
            await rest(closed)


async def test_what_is_opened_and_closed_before_the_loop_runs_leaves_nothing_behind() -> None:
    runner, witness = CountingRunner(slots=2), Witness()
    async with running(runner, witness, max_waiting=1) as engine:
        for length in (0, 1, CHUNK, 99):
            for _ in range(5):
                engine.open(opening(tokens_of(length), last=False)).close()
        assert (witness.waiting, witness.slots) == (0, 0)
        assert witness.ended == [("aborted", 0)] * 20
        assert engine.queue() == (0, 0)
        await settle()
        assert not runner.steps
        check(await read(engine, tokens_of(50)), tokens_of(50))


async def test_a_buffer_may_be_used_again_after_opening_and_feeding() -> None:
    runner, tokens = CountingRunner(), tokens_of(99)
    async with running(runner) as engine:
        runner.pause()
        buffer = tokens.copy()
        document = engine.open(opening(buffer[:50], last=False))
        buffer[:50] = 0
        feeding = asyncio.create_task(document.feed(buffer[50:], last=True))
        await settle()
        buffer[:] = 0
        runner.resume()
        check(await rest(document), tokens)
        await feeding


async def test_an_uploader_that_sent_nothing_holds_up_nobody() -> None:
    witness = Witness()
    async with running(CountingRunner(slots=1), witness) as engine:
        slow = engine.open(opening(NO_TOKENS, last=False))
        check(await read(engine, tokens_of(9)), tokens_of(9))
        assert witness.slots == 0
        await slow.feed(tokens_of(3), last=True)
        assert (await rest(slow))[-1].logits.tolist() == answer(tokens_of(3))


@pytest.mark.parametrize("options", [{"inbox_tokens": CHUNK - 1}, {"max_unread_rows": 0}])
def test_options_that_could_never_work_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Engine(
            CountingRunner(),
            **{"max_waiting": 1, "inbox_tokens": CHUNK, "idle_timeout_s": 1, **options},  # type: ignore[arg-type]
        )
