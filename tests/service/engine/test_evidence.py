"""What rows say: kept until it is taken, up to a bound, and the client's own."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gma.service.engine.progress import Progress, RowShares
from gma.service.errors import Stalled
from tests.service.engine.counting import (
    CHUNK,
    FULL,
    ROWS,
    Clock,
    CountingRunner,
    free_running,
    tokens_of,
)
from tests.service.engine.reading import (
    Witness,
    at_any_depth,
    check,
    opening,
    read,
    rest,
    running,
    shares_of,
)

pytestmark = pytest.mark.anyio


def arrays(progress: Progress) -> list[NDArray[Any]]:
    assert progress.shares
    return [progress.logits, *progress.shares]


@at_any_depth
@pytest.mark.parametrize("so_far", [True, False])
async def test_a_slow_client_loses_nothing_and_what_it_leaves_unread_is_bounded(
    depth: int, so_far: bool
) -> None:
    tokens = tokens_of(100 * CHUNK)
    async with running(free_running(depth), max_unread_rows=6) as engine:
        told = aiter(engine.open(opening(tokens, running=so_far)))
        progress = [await anext(told)]
        for _ in range(3):
            for i in range(20):
                check(await read(engine, tokens_of(9, i)), tokens_of(9, i))
            progress.append(await anext(told))
            assert 6 <= len(shares_of(progress[-1:]).tokens) < 6 + ROWS
        progress += [each async for each in told]
        check(progress, tokens)


@at_any_depth
async def test_what_nobody_ever_listened_to_is_bounded_too(depth: int) -> None:
    tokens = tokens_of(100 * CHUNK)
    async with running(free_running(depth), max_unread_rows=6) as engine:
        document = engine.open(opening(tokens))
        for i in range(50):
            check(await read(engine, tokens_of(9, i)), tokens_of(9, i))
        assert 6 <= document.read / CHUNK < 6 + ROWS
        check(await rest(document), tokens)


@pytest.mark.parametrize("bound", [1, 2, 6, 7])
@pytest.mark.parametrize(("interval_s", "so_far"), [(3600, True), (0, False)])
@at_any_depth
async def test_no_interval_holds_a_document_that_has_much_unread(
    depth: int, interval_s: float, so_far: bool, bound: int
) -> None:
    tokens = tokens_of(100 * CHUNK)
    options: dict[str, Any] = {"max_unread_rows": bound, "interval_s": interval_s}
    async with running(free_running(depth), **options) as engine:
        progress = await rest(engine.open(opening(tokens, running=so_far)))
        assert len(progress) >= 100 / (bound + ROWS)
        check(progress, tokens)


async def test_a_client_that_takes_it_is_not_dropped_and_one_that_does_not_is() -> None:
    clock = Clock()
    options: dict[str, Any] = {"clock": clock, "idle_timeout_s": 30, "max_unread_rows": 1}
    async with running(CountingRunner(rows=1), **options) as engine:
        taking, leaving = (engine.open(opening(tokens_of(9 * CHUNK))) for _ in range(2))
        told = aiter(taking)
        for _ in range(8):
            await anext(told)
            clock.now += 20
            await read(engine, tokens_of(1))  # any document's work makes the engine see the time
        assert (await anext(told)).done
        with pytest.raises(Stalled):
            await rest(leaving)


async def test_what_was_told_stays_as_it_was() -> None:
    """The runner overwrites its outcomes, and the engine its batches."""
    tokens, runner = tokens_of(9 * FULL), CountingRunner()
    async with running(runner) as engine:
        progress, copies = [], []
        async for each in engine.open(opening(tokens)):
            progress.append(each)
            copies.append([array.copy() for array in arrays(each)])
        await read(engine, tokens_of(9 * FULL, seed=1))
        check(progress, tokens)
        for each, copied in zip(progress, copies, strict=True):
            for now, then in zip(arrays(each), copied, strict=True):
                assert np.array_equal(now, then)
                assert now.base is None, "it keeps nothing else of its step alive"


async def test_mates_of_a_step_get_their_own_rows() -> None:
    runner, witness = CountingRunner(), Witness()
    async with running(runner, witness) as engine:
        runner.pause()
        lengths = (1, CHUNK, CHUNK - 1, 3)
        documents = [engine.open(opening(tokens_of(length))) for length in lengths]
        quiet = engine.open(opening(tokens_of(9), evidence=False))
        runner.resume()
        for document, length in zip(documents, lengths, strict=True):
            check(await rest(document), tokens_of(length))
        assert all(each.shares is None for each in await rest(quiet))


def test_shares_are_joined_in_order() -> None:
    def shares(start: int, end: int) -> RowShares:
        rows = np.arange(start, end)
        evidence = np.stack([rows, -rows], 1).astype(np.float32)
        return RowShares(rows.astype(np.int32), rows / 2, evidence)

    joined = RowShares.joined([shares(0, 2), shares(2, 3), shares(3, 7)])
    for part, expected in zip(joined, shares(0, 7), strict=True):
        np.testing.assert_array_equal(part, expected)
    assert [part.dtype for part in joined] == [np.int32, np.float64, np.float32]
    alone = shares(0, 2)
    assert RowShares.joined([alone]) is alone
