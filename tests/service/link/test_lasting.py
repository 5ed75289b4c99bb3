"""Documents whose workers are lost: another reads on, and nobody sees a difference."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from typing import IO, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gma.service.engine.document import Document
from gma.service.engine.engine import Engine
from gma.service.engine.opening import NO_TOKENS, Opening, Tokens
from gma.service.engine.progress import Progress, RowShares
from gma.service.errors import Overloaded, ShuttingDown, StepFailed, UnknownDocument
from gma.service.link import fed, lasting
from gma.service.link.client import OpenDocument, WorkerInfo
from gma.service.link.fed import Fed
from gma.service.link.lasting import MOST_LOSSES, LastingWorkers
from tests.service.engine.counting import CHUNK, PATIENCE_S, CountingRunner, answer, tokens_of

NEVER, KEPT, TOLD = 10**9, 10**8, 10**7


class Mortal:
    """A document that is lost after so many feeds and Progress together, or, with `KEPT`, when
    something was kept."""

    def __init__(self, document: Document, life: int, loss: Exception) -> None:
        self._document = document
        self._life = life
        self._loss = loss

    def _age(self, progress: Progress | None = None) -> None:
        if self._life not in (KEPT, TOLD):
            self._life -= 1
        elif progress and (progress.kept or self._life == TOLD):
            self._life = 0
        if self._life < 0:
            self._document.close()
            raise self._loss

    async def feed(self, tokens: Tokens, last: bool) -> None:
        self._age()
        await self._document.feed(tokens, last)

    async def __aiter__(self) -> AsyncIterator[Progress]:
        try:
            async for progress in self._document:
                self._age(progress)
                yield progress
        except UnknownDocument:
            raise self._loss from None

    def close(self) -> None:
        self._document.close()


class Workers:
    """One engine, which gives each document that is opened the next life; the last for ever."""

    count = 1

    def __init__(self, runner: CountingRunner, lives: Sequence[int], **options: Any) -> None:
        given: dict[str, Any] = {
            "max_waiting": 9,
            "inbox_tokens": 4 * CHUNK,
            "idle_timeout_s": 60,
            "model": "m",
        }
        self.engine = Engine(runner, **(given | options))
        self.lives = [*lives, NEVER]
        self.openings: list[Opening] = []
        self.opened: list[OpenDocument] = []
        self.refusals: list[Exception] = []
        self.loss: Exception = UnknownDocument("lost")

    async def open(self, opening: Opening) -> OpenDocument:
        if self.openings and self.refusals:
            raise self.refusals.pop()
        life = self.lives[min(len(self.openings), len(self.lives) - 1)]
        self.openings.append(opening)
        self.opened.append(Mortal(self.engine.open(opening), life, self.loss))
        return self.opened[-1]

    async def info(self) -> WorkerInfo:
        raise NotImplementedError


async def read(workers: Workers, pieces: Sequence[Tokens], **changes: Any) -> Progress:
    """The last Progress of a document that comes in pieces, with the shares of all of it."""
    opening = Opening("name", pieces[0], len(pieces) == 1, True, True)._replace(**changes)
    shares: list[RowShares] = []
    tokens = 0
    await workers.engine.start()
    try:
        with closing(await LastingWorkers(workers).open(opening)) as document:

            async def feed() -> None:
                for index, piece in enumerate(pieces[1:], 2):
                    await document.feed(piece, index == len(pieces))

            async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
                feeding = tasks.create_task(feed())
                async for progress in document:
                    assert progress.tokens >= tokens, "it went back"
                    tokens = progress.tokens
                    if progress.shares:
                        shares.append(progress.shares)
                        assert sum(int(each.tokens.sum()) for each in shares) == tokens
                feeding.cancel()
        return progress._replace(shares=RowShares.joined(shares) if shares else None)
    finally:
        await workers.engine.stop()


def runner() -> CountingRunner:
    found = CountingRunner()
    found.resume()
    return found


def cut(tokens: Tokens, places: Sequence[int]) -> list[Tokens]:
    return np.split(tokens, sorted(min(place, len(tokens) - 1) for place in places))


def check(found: Progress, expected: Progress) -> None:
    assert found.done
    assert (found.tokens, found.chunks) == (expected.tokens, expected.chunks)
    assert found.logits.tolist() == expected.logits.tolist()
    assert found.shares
    assert expected.shares
    for one, other in zip(found.shares, expected.shares, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found.usage, expected.usage)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(2, 12 * CHUNK),
    places=st.lists(st.integers(1, 12 * CHUNK), max_size=6, unique=True),
    lives=st.lists(st.integers(0, 9), max_size=MOST_LOSSES - 1),
    keep=st.sampled_from([1, CHUNK, 2 * CHUNK + 1, 99 * CHUNK]),
    components=st.booleans(),
    empty=st.booleans(),
)
def test_nobody_sees_that_workers_were_lost(
    length: int, places: list[int], lives: list[int], keep: int, components: bool, empty: bool
) -> None:
    pieces = cut(tokens_of(length), places) + [NO_TOKENS] * empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lasting, "KEEP_TOKENS", keep)
        expected = asyncio.run(read(Workers(runner(), []), pieces, components=components))
        found = asyncio.run(read(Workers(runner(), lives), pieces, components=components))
    assert expected.logits.tolist() == answer(np.concatenate(pieces))
    check(found, expected)


def test_it_goes_on_from_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only what came since is read again."""
    monkeypatch.setattr(lasting, "KEEP_TOKENS", 2 * CHUNK)
    counting = runner()
    workers = Workers(counting, [KEPT])
    pieces = cut(tokens_of(20 * CHUNK), range(CHUNK, 20 * CHUNK, CHUNK))
    asyncio.run(read(workers, pieces))
    first, second = workers.openings
    assert first.past is None
    assert second.past
    assert second.past.model == "m"
    rows = sum(int(np.count_nonzero(batch.lengths)) for batch in counting.steps)
    assert 20 < rows < 30, rows


def test_one_of_which_all_was_read_before_its_end_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the last feed brings: with `max_tokens` it may be nothing."""
    monkeypatch.setattr(lasting, "KEEP_TOKENS", CHUNK)
    pieces = [tokens_of(2 * CHUNK), NO_TOKENS]

    async def lost_at(tokens: int) -> Progress:
        workers = Workers(runner(), [])
        await workers.engine.start()
        try:
            opening = Opening("name", pieces[0], last=False, evidence=True, running=True)
            with closing(await LastingWorkers(workers).open(opening)) as document:
                shares = []
                async for progress in document:
                    shares.append(progress.shares)
                    if progress.done:
                        return progress._replace(
                            shares=RowShares.joined([each for each in shares if each])
                        )
                    if progress.tokens == tokens:
                        workers.opened[0].close()
                        await document.feed(pieces[1], last=True)
            raise AssertionError("it has no end")
        finally:
            await workers.engine.stop()

    expected = asyncio.run(read(Workers(runner(), []), pieces))
    found = asyncio.run(asyncio.wait_for(lost_at(2 * CHUNK), PATIENCE_S))
    check(found, expected)


def test_what_was_told_is_not_told_again() -> None:
    """Nothing was kept: all rows that were told are read again."""
    pieces = cut(tokens_of(20 * CHUNK), range(CHUNK, 20 * CHUNK, CHUNK))
    workers = Workers(runner(), [TOLD, TOLD])
    check(asyncio.run(read(workers, pieces)), asyncio.run(read(Workers(runner(), []), pieces)))
    assert [opening.past for opening in workers.openings] == [None] * 3


def test_a_worker_that_is_going_is_left() -> None:
    workers = Workers(runner(), [1])
    workers.loss = ShuttingDown("the worker is stopping")
    pieces = cut(tokens_of(5 * CHUNK), [CHUNK, 3 * CHUNK])
    assert asyncio.run(read(workers, pieces)).done
    assert len(workers.openings) == 2


def test_it_waits_until_another_worker_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lasting, "ASK_AGAIN_S", 0.001)
    workers = Workers(runner(), [1])
    workers.refusals = [Overloaded("full", 1), UnknownDocument("lost"), Overloaded("full", 1)]
    pieces = cut(tokens_of(5 * CHUNK), [CHUNK, 3 * CHUNK])
    assert asyncio.run(read(workers, pieces)).done
    assert not workers.refusals


def test_one_that_takes_worker_after_worker_with_it_is_given_up() -> None:
    workers = Workers(runner(), [0] * 99)
    with pytest.raises(ExceptionGroup) as error:
        asyncio.run(read(workers, cut(tokens_of(5 * CHUNK), [CHUNK])))
    assert error.group_contains(UnknownDocument)
    assert len(workers.openings) == MOST_LOSSES


def test_what_fails_at_its_worker_fails() -> None:
    workers = Workers(runner(), [1])
    workers.loss = StepFailed("reading the document failed: send it again")
    with pytest.raises(ExceptionGroup) as error:
        asyncio.run(read(workers, cut(tokens_of(5 * CHUNK), [CHUNK, 3 * CHUNK])))
    assert error.group_contains(StepFailed)
    assert len(workers.openings) == 1


def test_without_states_all_is_read_again() -> None:
    class Closed(CountingRunner):
        parts = None  # type: ignore[assignment]

    closed = Closed()
    closed.resume()
    workers = Workers(closed, [5])
    pieces = cut(tokens_of(9 * CHUNK), range(CHUNK, 9 * CHUNK, CHUNK))
    expected = asyncio.run(read(Workers(runner(), []), pieces))
    check(asyncio.run(read(workers, pieces)), expected)
    assert [opening.past for opening in workers.openings] == [None, None]


@pytest.mark.parametrize("memory", [1, 40, 10**6])
def test_what_was_fed_is_held_in_memory_and_in_a_file(
    monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    monkeypatch.setattr(fed, "MEMORY_BYTES", memory)
    monkeypatch.setattr(fed, "MOST_TOKENS", 7)
    tokens = tokens_of(50)
    held = Fed(tokens[:3], last=False)
    for begin in range(3, 45, 6):
        held.add(tokens[begin : begin + 6], last=False)
    held.add(tokens[45:], last=True)
    for dropped in (0, 2, 30, 44, 45):
        held.drop(dropped)
        position, found = dropped, []
        while following := held.after(position):
            found.append(following[0])
            position += len(following[0])
            if following[1]:
                break
        assert len(following[0]) == 5  # type: ignore[index]  # what came last stays apart
        assert np.concatenate(found).tolist() == tokens[dropped:].tolist()
        assert max(map(len, found)) <= 7
    held.forget()
    with pytest.raises(LookupError):
        held.after(45)


def full() -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


def full_once_written_to() -> IO[bytes]:
    return open("/dev/full", "w+b")  # noqa: PTH123


@pytest.mark.parametrize("full", [full, full_once_written_to])
def test_a_full_disk_costs_only_who_needs_it(
    monkeypatch: pytest.MonkeyPatch, full: Callable[[], Any]
) -> None:
    monkeypatch.setattr(fed, "MEMORY_BYTES", 1)
    monkeypatch.setattr(fed, "TemporaryFile", full)
    pieces = cut(tokens_of(5 * CHUNK), [CHUNK, 3 * CHUNK])
    assert asyncio.run(read(Workers(runner(), []), pieces)).done
    with pytest.raises(ExceptionGroup) as error:
        asyncio.run(read(Workers(runner(), [2]), pieces))
    assert error.group_contains(UnknownDocument)
