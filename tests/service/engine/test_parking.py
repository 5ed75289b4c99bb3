"""Documents that have no chunk ready give their slot to those that have."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from gma.service.engine.document import Document
from gma.service.engine.engine import Engine
from gma.service.engine.opening import Opening, Tokens
from gma.service.engine.progress import Progress
from gma.service.engine.step import Runner
from tests.service.engine.counting import (
    CHUNK,
    PATIENCE_S,
    CountingRunner,
    DeviceRunner,
    PassingRunner,
    answer,
    tokens_of,
)


def free(kind: type[CountingRunner], **options: Any) -> CountingRunner:
    runner = kind(**options)
    runner.resume()
    return runner


def engine_of(runner: Runner) -> Engine:
    return Engine(runner, max_waiting=99, inbox_tokens=8 * CHUNK, idle_timeout_s=60)


def opening(name: str, tokens: Tokens, *, last: bool = False) -> Opening:
    return Opening(name, tokens, last, evidence=True, running=True)


async def told(document: Document, tokens: int) -> Progress:
    """What is told when so many tokens were read."""
    async for progress in document:
        if progress.tokens == tokens:
            return progress
    raise AssertionError("no such progress")


async def in_turns(runner: CountingRunner, count: int, rounds: int) -> list[list[float]]:
    """The answers to so many documents, of which each gets a chunk a round, and some more tokens
    at last."""
    engine = engine_of(runner)
    await engine.start()
    try:
        texts = [tokens_of(rounds * CHUNK + 3, seed=seed) for seed in range(count)]
        open_ = [engine.open(opening(f"{index}", text[:CHUNK])) for index, text in enumerate(texts)]
        for turn in range(1, rounds):
            for document, text in zip(open_, texts, strict=True):
                await told(document, turn * CHUNK)
                await document.feed(text[turn * CHUNK : (turn + 1) * CHUNK], last=False)
        for document, text in zip(open_, texts, strict=True):
            await document.feed(text[rounds * CHUNK :], last=True)
        found = [await told(document, rounds * CHUNK + 3) for document in open_]
        assert [list(each.logits) for each in found] == [answer(text) for text in texts]
        return [list(each.logits) for each in found]
    finally:
        await engine.stop()


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_more_documents_than_slots_take_turns(slots: int) -> None:
    runner = free(CountingRunner, slots=slots)
    asyncio.run(asyncio.wait_for(in_turns(runner, 5, 4), PATIENCE_S))
    assert len(runner.threads) == 1


def test_they_do_while_steps_are_in_flight() -> None:
    runner = DeviceRunner(slots=2, held=False)
    asyncio.run(asyncio.wait_for(in_turns(runner, 5, 4), PATIENCE_S))


async def one_beside_a_slow_one(runner: CountingRunner) -> bool:
    """Whether one is read to its end in the only slot, while another's client is silent."""
    engine = engine_of(runner)
    await engine.start()
    try:
        text = tokens_of(2 * CHUNK)
        slow = engine.open(opening("slow", text[:CHUNK]))
        if runner.passes == 1:
            await told(slow, CHUNK)
        quick = engine.open(opening("quick", text, last=True))
        assert list((await told(quick, len(text))).logits) == answer(text)
        await slow.feed(text[CHUNK:], last=True)
        return list((await told(slow, len(text))).logits) == answer(text)
    finally:
        await engine.stop()


def test_a_silent_client_keeps_nobody_waiting() -> None:
    runner = free(CountingRunner, slots=1)
    assert asyncio.run(asyncio.wait_for(one_beside_a_slow_one(runner), PATIENCE_S))
    rows = sum(int(np.count_nonzero(batch.lengths)) for batch in runner.steps)
    assert rows == 4  # nothing was read twice


def test_whole_documents_have_no_slot_before_their_end() -> None:
    runner = free(PassingRunner, slots=1, pages=99)
    assert asyncio.run(asyncio.wait_for(one_beside_a_slow_one(runner), PATIENCE_S))


def test_one_whose_client_does_not_take_its_evidence_gives_its_slot_too() -> None:
    async def test() -> None:
        runner = free(CountingRunner, slots=1)
        engine = Engine(
            runner, max_waiting=9, inbox_tokens=8 * CHUNK, idle_timeout_s=60, max_unread_rows=1
        )
        await engine.start()
        try:
            text = tokens_of(4 * CHUNK)
            held = engine.open(opening("held", text, last=True))
            quick = engine.open(opening("quick", text[:CHUNK], last=True))
            await told(quick, CHUNK)
            assert list((await told(held, len(text))).logits) == answer(text)
        finally:
            await engine.stop()

    asyncio.run(asyncio.wait_for(test(), PATIENCE_S))
