"""Documents that go on: what was read of one is taken out of its slot, and put into another."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from gma.service.engine.engine import Engine
from gma.service.engine.opening import Opening, Past, Tokens
from gma.service.engine.progress import Progress
from gma.service.engine.snapshot import Part, Snapshot, decoded, encoded
from gma.service.engine.step import Runner
from gma.service.errors import NoSessions, ServiceError, SessionGone
from tests.service.engine.counting import (
    CHUNK,
    NO_TOKENS,
    PATIENCE_S,
    CountingRunner,
    answer,
    free_running,
    tokens_of,
)

MODEL = "a model"


async def read(engine: Engine, past: Past, certain: Tokens, rest: Tokens) -> Progress:
    """The last progress of what goes on after `past`; `rest` comes with the last feed."""
    opening = Opening("name", certain, False, False, False, past=past, keep_tokens=1, steady=True)
    document = engine.open(opening)
    await document.feed(rest, last=True)
    async for progress in document:
        if progress.done:
            return progress
    raise AssertionError("no end")


def engine_of(runner: Runner) -> Engine:
    return Engine(runner, max_waiting=9, inbox_tokens=100, idle_timeout_s=60, model=MODEL)


async def in_turns(runner: Runner, cuts: list[int], tokens: Tokens, rest: int) -> list[float]:
    """The answer to all tokens, that came in several openings, each with the `rest` that the next
    takes back."""
    engine = engine_of(runner)
    await engine.start()
    kept, past, progress = 0, Past(MODEL, b""), None
    try:
        for cut in [*cuts, len(tokens)]:
            certain = max(kept, cut - rest)
            if cut == kept:
                continue  # nothing new to read
            progress = await read(engine, past, tokens[kept:certain], tokens[certain:cut])
            assert progress.logits.tolist() == answer(tokens[:cut])
            if progress.kept:
                assert progress.kept.tokens == (certain - kept) // CHUNK * CHUNK > 0
                assert progress.kept.chunks * CHUNK == progress.kept.tokens
                kept += progress.kept.tokens
                past = progress.kept.past
            assert certain - kept < CHUNK
        assert progress
        return list(progress.logits)
    finally:
        await engine.stop()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("rest", [0, 1, CHUNK, CHUNK + 1])
def test_what_goes_on_is_read_as_the_whole(depth: int, rest: int) -> None:
    tokens = tokens_of(9 * CHUNK + 1)
    cuts = [1, 2, CHUNK, CHUNK + 3, 2 * CHUNK, 2 * CHUNK, 8 * CHUNK, 9 * CHUNK]
    runner = free_running(depth)
    found = asyncio.run(asyncio.wait_for(in_turns(runner, cuts, tokens, rest), PATIENCE_S))
    assert found == answer(tokens)
    assert all(np.count_nonzero(batch.lengths) == 1 for batch in runner.steps)
    assert len(runner.threads) == 1


async def refused(runner: Runner, past: Past) -> ServiceError:
    engine = engine_of(runner)
    await engine.start()
    try:
        with pytest.raises(ServiceError) as error:
            engine.open(Opening("name", NO_TOKENS, False, False, False, past=past))
        return error.value
    finally:
        await engine.stop()


SUMS = np.array([[1.0, 2.0, 3.0]])


@pytest.mark.parametrize(
    "past",
    [
        Past("another", b""),
        Past(MODEL, b"\0"),
        Past(MODEL, encoded({})),
        Past(MODEL, encoded({"sum": SUMS})),
        Past(MODEL, encoded({"sums": SUMS, "more": SUMS})),
        Past(MODEL, encoded({"sums": SUMS.astype(np.float32)})),
        Past(MODEL, encoded({"sums": SUMS[0]})),
        Past(MODEL, encoded({"sums": SUMS[:, :2].copy()})),
        Past(MODEL, encoded({"sums": SUMS * np.inf})),
        Past(MODEL, encoded({"sums": SUMS * np.nan})),
    ],
)
def test_a_past_that_does_not_fit_is_refused(past: Past) -> None:
    assert isinstance(asyncio.run(refused(CountingRunner(), past)), SessionGone)


def test_a_runner_that_does_not_give_states_refuses_a_past() -> None:
    class Closed(CountingRunner):
        parts = None  # type: ignore[assignment]

    assert isinstance(asyncio.run(refused(Closed(), Past(MODEL, b""))), NoSessions)


def test_a_snapshot_survives_its_encoding() -> None:
    snapshot: Snapshot = {"a": np.arange(6, dtype=np.float32).reshape(1, 2, 3), "b": np.ones(1)}
    parts = {name: Part(x.shape[1:], x.dtype) for name, x in snapshot.items()}
    found = decoded(encoded(snapshot), parts)
    assert found.keys() == snapshot.keys()
    for name, x in snapshot.items():
        np.testing.assert_array_equal(found[name], x, strict=True)
