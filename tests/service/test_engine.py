"""The engine, with a runner that counts instead of thinking: answers are compared exactly."""

import asyncio
import random
import threading
import tracemalloc
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from gma.model.grid import Grid
from gma.service.engine.engine import LEAD_S, Ending, Engine, Observer, Progress
from gma.service.engine.slots import Slots
from gma.service.engine.step import Batch, Ended, Launched, Outcome
from gma.service.errors import (
    EmptyDocument,
    NotReady,
    Overloaded,
    ServiceError,
    ShuttingDown,
    Stalled,
    StepFailed,
    UnknownDocument,
    WrongOffset,
)
from gma.service.observe.memory import Memory

CHUNK = 4
ROWS = 4
RAISES = 998  # a token that makes its step raise
OVERFLOWS = 999  # a token that makes its row NaN

Tokens = NDArray[np.int32]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class CountingRunner:
    """Labels: the mean of the tokens, and a sum that depends on where each one stands.

    Checks what every runner relies on, and never clears a slot: what `fresh` does not reset stays.
    """

    backend, device, labels, vocab_size = "counting", "cpu", ("mean", "order"), 1000
    dtype, kernels = "int64", "none"
    versions: ClassVar[Mapping[str, str]] = {}
    depth = 1

    def __init__(
        self, *, slots: int = 8, rows: int = ROWS, chunk: int = CHUNK, clock: Clock | None = None
    ) -> None:
        self.grids = [Grid(r, chunk) for r in (1, 2, 4, 8) if r <= rows]
        self.pool = Slots(slots)
        self.sums = np.full((slots + 1, 3), np.nan)  # read, total, ordered
        self.steps: deque[Batch] = deque()
        self.threads: set[int] = set()
        self.clock = clock
        self.entered = threading.Event()
        self.go = threading.Event()
        self.go.set()

    def memory(self) -> Memory:
        return Memory(0, 0, 0, 0)

    def warm_up(self) -> None:
        self.threads.add(threading.get_ident())

    def launch(self, batch: Batch) -> Launched:
        self.take(batch)
        self.entered.set()
        assert self.go.wait(10)
        self.end(batch)
        return Ended(self.count(batch))

    def take(self, batch: Batch) -> None:
        self.threads.add(threading.get_ident())
        self.steps.append(batch)
        check_layout(batch, self.pool.scratch)

    def end(self, batch: Batch) -> None:
        if self.clock:
            self.clock.now += 1
        if RAISES in batch.tokens:
            raise RuntimeError("the device has had enough")

    def count(self, batch: Batch) -> Outcome:
        rows = len(batch.lengths)
        outcome = Outcome(
            np.zeros((rows, 2), np.float32), np.zeros(rows, np.float32), np.zeros((rows, 2))
        )
        sums = self.sums[batch.slot_of_document]
        sums[batch.fresh] = 0
        for row, (length, document) in enumerate(
            zip(batch.lengths, batch.document_of_row, strict=True)
        ):
            tokens = batch.tokens[row, :length]
            places = (sums[document, 0] + np.arange(length)) % 97 + 1
            share = np.array([length, tokens.sum(), (tokens * places).sum()])
            if OVERFLOWS in tokens:
                share[1:] = np.nan
            sums[document] += share
            outcome.evidence[row], outcome.weight[row] = share[1:], length
        self.sums[batch.slot_of_document] = sums
        with np.errstate(invalid="ignore"):
            outcome.logits[:] = sums[:, 1:] / sums[:, :1]
        return outcome

    async def until_in_step(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 10)

    def pause(self) -> None:
        self.entered.clear()
        self.go.clear()

    def resume(self) -> None:
        self.go.set()


class DeviceRunner(CountingRunner):
    """Steps are in flight until the test ends each of them, or all that come."""

    def __init__(self, *, depth: int = 2, held: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.depth = depth
        self.in_flight: deque[Batch] = deque()
        self.waiters: set[int] = set()
        self.launches = threading.Semaphore(0)
        self.ends = threading.Semaphore(0)
        if not held:
            self.resume()

    def launch(self, batch: Batch) -> Launched:
        self.take(batch)
        busy = [slot for other in self.in_flight for slot in other.slot_of_document]
        taken = {*batch.slot_of_document[batch.fresh].tolist()} & {*busy} - {self.pool.scratch}
        assert not taken, "a slot was given back under a step in flight"
        self.in_flight.append(batch)
        assert len(self.in_flight) <= self.depth
        self.launches.release()
        return Flying(self, batch, self.count(batch))

    async def until_launched(self, steps: int) -> None:
        """So many more than were waited for before."""
        for _ in range(steps):
            assert await asyncio.to_thread(self.launches.acquire, timeout=10)

    def end_step(self) -> None:
        self.ends.release()

    def resume(self) -> None:
        self.ends.release(100_000)


class Flying(NamedTuple):
    """A step of a DeviceRunner."""

    runner: DeviceRunner
    batch: Batch
    result: Outcome

    def outcome(self) -> Outcome:
        self.runner.waiters.add(threading.get_ident())
        assert self.runner.ends.acquire(timeout=10)
        assert self.runner.in_flight.popleft() is self.batch
        self.runner.end(self.batch)
        return self.result


class Finished(Observer):
    """Lets a test wait until a step's documents were told."""

    def __init__(self) -> None:
        self.steps = asyncio.Semaphore(0)

    def stepped(self, rows: int, grid_rows: int, tokens: int, seconds: float) -> None:
        self.steps.release()

    def step_failed(self) -> None:
        self.steps.release()


def free_running(depth: int, **options: Any) -> CountingRunner:
    return CountingRunner(**options) if depth == 1 else DeviceRunner(held=False, **options)


at_long_intervals = pytest.mark.parametrize("interval_s", [3600, None])
at_any_depth = pytest.mark.parametrize("depth", [1, 2])


def check_layout(batch: Batch, scratch: int) -> None:
    used = int((batch.lengths > 0).sum())
    assert not (batch.lengths[used:] > 0).any()
    documents = batch.document_of_row[:used]
    assert (np.diff(documents) >= 0).all(), "rows of a document stand together"
    for row in range(used - 1):
        if documents[row] == documents[row + 1]:
            assert batch.lengths[row] == batch.tokens.shape[1], (
                "only a document's last row may be partial"
            )
    slots = batch.slot_of_document[np.unique(documents)]
    assert len({*slots.tolist(), scratch}) == len(slots) + 1
    if used < len(batch.lengths):
        assert batch.document_of_row[used:].min() > documents.max()
        assert (batch.slot_of_document[batch.document_of_row[used:]] == scratch).all()


def tokens_of(length: int, seed: int = 0) -> Tokens:
    return np.random.default_rng([seed, length]).integers(0, RAISES, length, dtype=np.int32)


def answer(tokens: Tokens) -> list[float]:
    places = np.arange(len(tokens)) % 97 + 1
    return [tokens.sum() / len(tokens), (tokens * places).sum() / len(tokens)]


@asynccontextmanager
async def running(runner: CountingRunner, **options: Any) -> AsyncIterator[Engine]:
    options = {"max_waiting": 64, "inbox_tokens": 64, "idle_timeout_s": 1e6, **options}
    engine = Engine(runner, **options)
    await engine.start()
    try:
        yield engine
    finally:
        runner.resume()
        await engine.stop()
        assert runner.pool.in_use == 0, "every slot came back"


def run(test: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


async def settle() -> None:
    """Let everything happen that can happen while the compute thread is idle or paused."""
    for _ in range(20):
        await asyncio.sleep(0)


NO_TOKENS = tokens_of(0)


async def read(
    engine: Engine, name: str, pieces: Iterable[Tokens], evidence: bool = True
) -> list[Progress]:
    """Open with the first piece, feed the others, and say with the last that it is the last."""
    first, *others = pieces

    async def feed() -> None:
        offset = len(first)
        for i, piece in enumerate(others, 1):
            await engine.feed(name, offset, piece, last=i == len(others))
            offset += len(piece)

    async with aclosing(engine.read(name, first, not others, evidence=evidence)) as reading:
        following = asyncio.ensure_future(anext(reading))
        await asyncio.sleep(0)
        feeding = asyncio.ensure_future(feed())
        progress: list[Progress] = []
        try:
            while not progress or not progress[-1].done:
                progress.append(await (anext(reading) if progress else following))
            await feeding
        except BaseException:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
            raise
    return progress


async def open_(engine: Engine, name: str, tokens: Tokens, last: bool) -> asyncio.Task[Progress]:
    """The first Progress to come of a document that is open from now on."""
    reading = engine.read(name, tokens, last)

    async def following() -> Progress:
        return await anext(reading)

    task = asyncio.create_task(following())
    task.reading = reading  # type: ignore[attr-defined]
    await settle()
    return task


def cut(tokens: Tokens, rng: random.Random) -> list[Tokens]:
    at = sorted(rng.choices(range(len(tokens) + 1), k=rng.randrange(6)))
    return np.split(tokens, at)


def check(progress: list[Progress], tokens: Tokens) -> None:
    final = progress[-1]
    spans = [span for each in progress for span in each.spans]
    assert [each.done for each in progress] == [False] * (len(progress) - 1) + [True]
    assert final.logits.tolist() == answer(tokens)
    assert final.tokens == len(tokens)
    assert final.chunks == len(spans)
    sizes = [CHUNK] * (len(tokens) // CHUNK) + [len(tokens) % CHUNK] * (len(tokens) % CHUNK > 0)
    assert [span.tokens for span in spans] == sizes, "cut by length alone"
    evidence = np.sum([span.evidence.astype(float) for span in spans], axis=0)
    assert (evidence / sum(span.weight for span in spans)).tolist() == answer(tokens)


# Answers.


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, ROWS * CHUNK, 63, 1000])
def test_a_document_in_one_piece(length: int) -> None:
    async def test() -> None:
        async with running(CountingRunner()) as engine:
            check(await read(engine, "a", [tokens_of(length)]), tokens_of(length))

    run(test)


@at_any_depth
@pytest.mark.parametrize("seed", range(20))
def test_however_it_is_cut_the_answer_and_its_spans_are_those_of_one_piece(
    seed: int, depth: int
) -> None:
    async def test() -> None:
        rng = random.Random(seed)
        tokens = tokens_of(rng.randrange(1, 200), seed)
        runner = free_running(depth)
        async with running(runner, inbox_tokens=rng.randrange(CHUNK, 40)) as engine:
            check(await read(engine, "a", cut(tokens, rng)), tokens)

    run(test)


@pytest.mark.parametrize("length", [CHUNK, 3 * CHUNK, 3 * CHUNK + 1])
def test_the_end_may_come_without_tokens(length: int) -> None:
    async def test() -> None:
        tokens = tokens_of(length)
        async with running(CountingRunner()) as engine:
            reading = engine.read("a", tokens, last=False)
            progress: list[Progress] = []
            while sum(each.tokens for each in progress[-1:]) < length - length % CHUNK:
                progress.append(await anext(reading))
            await engine.feed("a", length, NO_TOKENS, last=True)
            progress += [each async for each in reading]
            check(progress, tokens)

    run(test)


@at_any_depth
@pytest.mark.parametrize("seed", range(8))
def test_documents_beside_each_other_do_not_see_each_other(seed: int, depth: int) -> None:
    async def test() -> None:
        rng = random.Random(seed)
        documents = [tokens_of(rng.randrange(1, 300), i) for i in range(30)]
        async with running(free_running(depth, slots=rng.randrange(1, 9))) as engine:
            answers = await asyncio.gather(
                *(read(engine, str(i), cut(t, rng)) for i, t in enumerate(documents))
            )
        for progress, tokens in zip(answers, documents, strict=True):
            check(progress, tokens)

    run(test)


@at_any_depth
@pytest.mark.parametrize("seed", range(8))
def test_a_storm_of_aborts_and_failures_leaves_the_others_right(seed: int, depth: int) -> None:
    """Documents that are cancelled, aborted or overflow, among ones that stay."""

    async def test() -> None:
        rng = random.Random(seed)
        runner = free_running(depth, slots=5)
        documents = [tokens_of(rng.randrange(1, 300), i) for i in range(60)]
        fates = [rng.choice(["stays", "cancel", "abort", "overflow"]) for _ in documents]
        for tokens, fate in zip(documents, fates, strict=True):
            if fate == "overflow":
                tokens[rng.randrange(len(tokens))] = OVERFLOWS

        async def leave(task: asyncio.Task[Any], name: str, fate: str) -> None:
            for _ in range(rng.randrange(200)):
                await asyncio.sleep(0)
            if fate == "cancel":
                task.cancel()
            elif fate == "abort":
                engine.abort(name)

        async with running(runner) as engine:
            tasks: list[asyncio.Task[Any]] = []
            for i, tokens in enumerate(documents):
                tasks.append(asyncio.create_task(read(engine, str(i), cut(tokens, rng))))
                tasks.append(asyncio.create_task(leave(tasks[-1], str(i), fates[i])))
            results = await asyncio.gather(*tasks, return_exceptions=True)
        errors = {
            "cancel": asyncio.CancelledError,
            "abort": UnknownDocument,
            "overflow": StepFailed,
        }
        for tokens, fate, result in zip(documents, fates, results[::2], strict=True):
            if isinstance(result, list):
                check(result, tokens)
                assert fate != "overflow"
            else:
                assert isinstance(result, errors[fate])
        assert sum(isinstance(result, list) for result in results[::2]) >= fates.count("stays")

    run(test)


# Scheduling.


def test_a_short_document_does_not_wait_for_the_books() -> None:
    async def test() -> None:
        runner = CountingRunner(rows=8)
        async with running(runner, inbox_tokens=4 * 8 * CHUNK) as engine:
            books = [
                asyncio.create_task(
                    read(engine, f"book {i}", [tokens_of(8000, i) % 900], evidence=False)
                )
                for i in range(4)
            ]
            await runner.until_in_step()
            for mark in range(900, 910):
                begun = len(runner.steps)
                await read(engine, "short", [np.full(2 * CHUNK, mark, np.int32)])
                steps = [
                    i for i, batch in enumerate(runner.steps) if (batch.tokens == mark).all(1).any()
                ]
                assert steps == [steps[0], steps[0] + 1]
                assert steps[0] <= begun + 1
            assert not any(book.done() for book in books)
            await asyncio.gather(*books)

    run(test)


def test_a_stream_of_short_documents_does_not_starve_a_book() -> None:
    async def test() -> None:
        async with running(CountingRunner(rows=1)) as engine:
            book = asyncio.create_task(read(engine, "book", [tokens_of(20 * CHUNK)]))

            async def keep_sending(name: str) -> None:
                for i in range(60):
                    await read(engine, f"{name} {i}", [tokens_of(CHUNK)])

            clients = [asyncio.create_task(keep_sending(name)) for name in "abcd"]
            done, _ = await asyncio.wait([book, *clients], return_when=asyncio.FIRST_COMPLETED)
            assert done == {book}, "its 20 rows take 100 steps, theirs 240"
            await asyncio.gather(*clients)

    run(test)


def test_a_lone_short_document_takes_the_smallest_grid() -> None:
    async def test() -> None:
        runner = CountingRunner()
        async with running(runner) as engine:
            await read(engine, "a", [tokens_of(3)])
            await read(engine, "b", [tokens_of(3 * CHUNK)])
        assert [batch.tokens.shape for batch in runner.steps] == [(1, CHUNK), (4, CHUNK)]

    run(test)


def test_a_partial_chunk_waits_for_more_or_for_the_end() -> None:
    async def test() -> None:
        runner = CountingRunner()
        async with running(runner) as engine:
            following = await open_(engine, "a", tokens_of(CHUNK - 1), last=False)
            check(await read(engine, "b", [tokens_of(5)]), tokens_of(5))
            assert not following.done()
            engine.abort("a")
            await asyncio.gather(following, return_exceptions=True)
        assert sum(batch.lengths.sum() for batch in runner.steps) == 5

    run(test)


def test_every_step_is_launched_in_the_thread_that_warmed_up_and_awaited_in_another() -> None:
    async def test() -> None:
        runner = DeviceRunner(held=False)
        async with running(runner) as engine:
            await asyncio.gather(*(read(engine, str(i), [tokens_of(99)]) for i in range(9)))
        assert len(runner.threads) == len(runner.waiters) == 1
        assert len(runner.threads | runner.waiters | {threading.get_ident()}) == 3

    run(test)


# Two steps in flight. What is launched, and when, shows in the steps' tokens.

FULL = ROWS * CHUNK


def marked(mark: int, chunks: int) -> Tokens:
    return np.full(chunks * CHUNK, mark, np.int32)


def marks(batch: Batch) -> list[int]:
    """What stands in the rows of a step, unused ones left out."""
    return [int(row[0]) for row in batch.tokens[batch.lengths > 0]]


def test_a_lone_long_document_is_in_two_steps_at_once() -> None:
    async def test() -> None:
        runner = DeviceRunner()
        tokens = tokens_of(3 * FULL + 1)
        async with running(runner) as engine:
            following = await open_(engine, "a", tokens, last=True)
            await runner.until_launched(2)
            assert not following.done()
            runner.end_step()
            progress = [await following]
            await runner.until_launched(1)
            for _ in range(3):
                runner.end_step()
                progress.append(await anext(following.reading))  # type: ignore[attr-defined]
            assert [each.tokens for each in progress] == [FULL, 2 * FULL, 3 * FULL, 3 * FULL + 1]
            check(progress, tokens)

    run(test)


@at_any_depth
def test_steps_in_flight_are_no_more_than_the_runners_depth(depth: int) -> None:
    async def test() -> None:
        runner = DeviceRunner(depth=depth)
        async with running(runner) as engine:
            book = asyncio.create_task(read(engine, "book", [marked(1, 4 * ROWS)]))
            await runner.until_launched(depth)
            late = asyncio.create_task(read(engine, "late", [marked(2, 1)]))
            await settle()
            runner.resume()
            await asyncio.gather(book, late)
        assert [2 in marks(batch) for batch in runner.steps].index(True) == depth

    run(test)


def test_a_step_that_is_not_full_waits_for_the_running_one_and_takes_in_who_comes_meanwhile() -> (
    None
):
    async def test() -> None:
        runner = DeviceRunner()
        async with running(runner) as engine:
            first = asyncio.create_task(read(engine, "first", [marked(1, ROWS + 1)]))
            await runner.until_launched(1)
            second = asyncio.create_task(read(engine, "second", [marked(2, 1)]))
            await settle()
            runner.resume()
            await asyncio.gather(first, second)
        assert [sorted(marks(batch)) for batch in runner.steps] == [[1] * ROWS, [1, 2]]

    run(test)


def test_a_step_that_becomes_full_waits_no_longer() -> None:
    async def test() -> None:
        runner = DeviceRunner()
        async with running(runner) as engine:
            first = asyncio.create_task(read(engine, "first", [marked(1, ROWS + 1)]))
            await runner.until_launched(1)
            second = asyncio.create_task(read(engine, "second", [marked(2, ROWS - 1)]))
            await runner.until_launched(1)
            assert sorted(marks(runner.steps[1])) == [1] + [2] * (ROWS - 1)
            assert len(runner.in_flight) == 2
            runner.resume()
            await asyncio.gather(first, second)

    run(test)


def test_a_full_step_is_launched_behind_another_only_when_that_is_about_to_end() -> None:
    async def test() -> None:
        clock = Clock()
        runner, finished = DeviceRunner(clock=clock), Finished()
        async with running(runner, clock=clock, observer=finished) as engine:
            book = asyncio.create_task(read(engine, "book", [marked(1, 4 * ROWS)]))
            await runner.until_launched(2)  # nobody knows yet how long they last
            runner.end_step()  # 1 s after its launch
            await finished.steps.acquire()
            await settle()
            assert len(runner.steps) == 2
            late = asyncio.create_task(read(engine, "late", [marked(2, 1)]))
            await settle()
            assert len(runner.steps) == 2
            clock.now += 1 - LEAD_S / 2
            later = asyncio.create_task(read(engine, "later", [marked(3, 1)]))
            await runner.until_launched(1)
            assert {2, 3} <= {*marks(runner.steps[2])}
            runner.resume()
            await asyncio.gather(book, late, later)

    run(test)


def test_a_failed_step_fails_its_documents_once_and_the_next_step_keeps_its_others() -> None:
    class Tally(Finished):
        def __init__(self) -> None:
            super().__init__()
            self.ended: list[Ending] = []

        def closed(self, how: Ending, progress: Progress) -> None:
            self.ended.append(how)

    async def test() -> None:
        tally = Tally()
        runner = DeviceRunner(slots=2)
        culprit = marked(1, ROWS + 2)
        culprit[3] = RAISES
        async with running(runner, observer=tally) as engine:
            failing = asyncio.create_task(read(engine, "culprit", [culprit]))
            await runner.until_launched(1)
            mate = asyncio.create_task(read(engine, "mate", [marked(2, ROWS - 2)]))
            await runner.until_launched(1)
            assert {*marks(runner.steps[1])} == {1, 2}
            runner.end_step()
            await tally.steps.acquire()
            with pytest.raises(StepFailed, match="reading the document failed"):
                await failing
            assert engine.failed_steps == 1
            assert runner.pool.in_use == 2, "the next step is in flight, in both slots"
            runner.end_step()
            check(await mate, marked(2, ROWS - 2))
            assert runner.pool.in_use == 0
            assert engine.failed_steps == 0
            assert tally.ended == ["failed", "done"]

    run(test)


def test_numbers_that_are_not_finite_fail_their_own_document_with_more_of_it_in_flight() -> None:
    async def test() -> None:
        finished = Finished()
        runner = DeviceRunner(slots=2)
        culprit = marked(1, ROWS + 2)
        culprit[3] = OVERFLOWS
        async with running(runner, observer=finished) as engine:
            failing = asyncio.create_task(read(engine, "culprit", [culprit]))
            await runner.until_launched(1)
            mate = asyncio.create_task(read(engine, "mate", [marked(2, ROWS - 2)]))
            await runner.until_launched(1)
            assert {*marks(runner.steps[1])} == {1, 2}
            runner.end_step()
            await finished.steps.acquire()
            with pytest.raises(StepFailed, match="not finite"):
                await failing
            assert runner.pool.in_use == 2, "the next step is in flight, in both slots"
            runner.end_step()
            check(await mate, marked(2, ROWS - 2))
            assert runner.pool.in_use == 0

    run(test)


def test_an_aborted_documents_slot_stays_until_the_last_step_with_its_rows_has_ended() -> None:
    async def test() -> None:
        finished = Finished()
        runner = DeviceRunner(slots=1)
        async with running(runner, observer=finished) as engine:
            aborted = await open_(engine, "a", tokens_of(5 * FULL), last=True)
            await runner.until_launched(2)
            engine.abort("a")
            with pytest.raises(UnknownDocument):
                await aborted
            for slots in (1, 0):
                runner.end_step()
                await finished.steps.acquire()
                assert runner.pool.in_use == slots
            assert len(runner.steps) == 2
            runner.resume()
            check(await read(engine, "a", [tokens_of(50)]), tokens_of(50))

    run(test)


def test_stopping_ends_both_steps_in_flight_and_launches_no_other() -> None:
    async def test() -> None:
        finished = Finished()
        runner = DeviceRunner()
        async with running(runner, observer=finished) as engine:
            book = asyncio.create_task(read(engine, "book", [marked(1, 9 * ROWS)]))
            await runner.until_launched(2)
            stopping = asyncio.create_task(engine.stop())
            for _ in range(2):
                await settle()
                assert not stopping.done()
                assert not book.done()
                runner.end_step()
                await finished.steps.acquire()
            await stopping
            with pytest.raises(ShuttingDown):
                await book
            assert len(runner.steps) == 2

    run(test)


def test_a_document_whose_last_rows_are_in_flight_at_the_stop_gets_its_answer() -> None:
    async def test() -> None:
        runner = DeviceRunner()
        async with running(runner) as engine:
            ending = asyncio.create_task(read(engine, "ending", [tokens_of(2 * FULL)]))
            await runner.until_launched(2)
            stopping = asyncio.create_task(engine.stop())
            await settle()
            runner.resume()
            await stopping
            check(await ending, tokens_of(2 * FULL))

    run(test)


# Slots and the waiting room.


def test_beyond_the_waiting_room_documents_are_turned_away() -> None:
    async def test() -> None:
        runner = CountingRunner(slots=1)
        async with running(runner, max_waiting=1) as engine:
            runner.pause()
            first = asyncio.create_task(read(engine, "first", [tokens_of(9)]))
            await runner.until_in_step()
            second = asyncio.create_task(read(engine, "second", [tokens_of(9)]))
            await settle()
            with pytest.raises(Overloaded):
                await anext(engine.read("third", tokens_of(9), last=True))
            runner.go.set()
            check(await first, tokens_of(9))
            check(await second, tokens_of(9))
            check(await read(engine, "third", [tokens_of(9)]), tokens_of(9))

    run(test)


def test_a_burst_no_larger_than_the_slots_waits_for_nothing() -> None:
    async def test() -> None:
        async with running(CountingRunner(slots=8), max_waiting=1) as engine:
            await asyncio.gather(*(read(engine, str(i), [tokens_of(9)]) for i in range(8)))

    run(test)


def test_an_uploader_that_sent_nothing_holds_up_nobody() -> None:
    async def test() -> None:
        runner = CountingRunner(slots=1)
        async with running(runner) as engine:
            slow = await open_(engine, "slow", NO_TOKENS, last=False)
            check(await read(engine, "b", [tokens_of(9)]), tokens_of(9))
            assert runner.pool.in_use == 0
            await engine.feed("slow", 0, tokens_of(3), last=True)
            assert (await slow).logits.tolist() == answer(tokens_of(3))

    run(test)


def test_slots_go_to_those_who_came_first() -> None:
    async def test() -> None:
        runner = CountingRunner(slots=1)
        ended: list[str] = []

        async def follow(name: str) -> None:
            await read(engine, name, [tokens_of(9)])
            ended.append(name)

        async with running(runner) as engine:
            await asyncio.gather(*(follow(name) for name in "abcdef"))
        assert ended == list("abcdef")

    run(test)


@pytest.mark.parametrize("how", ["abort", "close", "cancel"])
def test_a_slot_is_not_given_back_under_a_running_step(how: str) -> None:
    async def test() -> None:
        runner = CountingRunner(slots=1)
        async with running(runner) as engine:
            runner.pause()
            task = asyncio.create_task(read(engine, "a", [tokens_of(99)]))
            await runner.until_in_step()
            if how == "abort":
                engine.abort("a")
                with pytest.raises(UnknownDocument):
                    await task
            else:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert runner.pool.in_use == 1
            following = asyncio.create_task(read(engine, "a", [tokens_of(50)]))
            await settle()
            runner.go.set()
            check(await following, tokens_of(50))

    run(test)


def test_closing_the_reader_early_ends_the_document() -> None:
    async def test() -> None:
        runner = CountingRunner()
        async with running(runner) as engine:
            reading = engine.read("a", tokens_of(99), last=False)
            await anext(reading)
            await reading.aclose()
            with pytest.raises(UnknownDocument):
                await engine.feed("a", 99, tokens_of(1), last=True)

    run(test)


# Feeding.


def test_feeding_at_a_wrong_offset_tells_the_right_one_and_changes_nothing() -> None:
    async def test() -> None:
        tokens = tokens_of(30)
        async with running(CountingRunner()) as engine:
            reading = engine.read("a", tokens[:10], last=False)
            progress = [await anext(reading)]
            for offset in (0, 9, 11):
                with pytest.raises(WrongOffset) as caught:
                    await engine.feed("a", offset, tokens[10:], last=True)
                assert caught.value.expected == 10
            await engine.feed("a", 10, tokens[10:], last=True)
            check(progress + [each async for each in reading], tokens)

    run(test)


def test_only_open_documents_can_be_fed() -> None:
    async def test() -> None:
        async with running(CountingRunner()) as engine:
            await read(engine, "finished", [tokens_of(9)])
            for name in ("never opened", "finished"):
                with pytest.raises(UnknownDocument):
                    await engine.feed(name, 9, tokens_of(1), last=True)
                engine.abort(name)

    run(test)


def test_nothing_follows_the_last_tokens() -> None:
    async def test() -> None:
        runner = CountingRunner()
        async with running(runner) as engine:
            runner.pause()
            task = asyncio.create_task(read(engine, "a", [tokens_of(9)]))
            await runner.until_in_step()
            await engine.feed("a", 9, NO_TOKENS, last=True)
            with pytest.raises(ValueError, match="complete"):
                await engine.feed("a", 9, tokens_of(1), last=True)
            runner.go.set()
            check(await task, tokens_of(9))

    run(test)


def test_an_empty_document_is_an_error() -> None:
    async def test() -> None:
        async with running(CountingRunner()) as engine:
            with pytest.raises(EmptyDocument):
                await read(engine, "a", [NO_TOKENS])
            with pytest.raises(EmptyDocument):
                await read(engine, "b", [NO_TOKENS, NO_TOKENS])

    run(test)


@pytest.mark.parametrize(
    "tokens", [np.array([1000]), np.array([-1]), np.array([0.5]), np.zeros((2, 2), np.int32)]
)
def test_tokens_that_are_none_are_refused_before_they_can_fail_a_step(tokens: Any) -> None:
    async def test() -> None:
        async with running(CountingRunner()) as engine:
            with pytest.raises(ValueError, match="tokens must be"):
                await anext(engine.read("a", tokens, last=True))

    run(test)


def test_a_buffer_may_be_used_again_after_feeding() -> None:
    async def test() -> None:
        runner = CountingRunner()
        tokens = tokens_of(99)
        async with running(runner) as engine:
            runner.pause()
            buffer = tokens.copy()
            task = asyncio.create_task(read(engine, "a", [buffer]))
            await settle()
            buffer[:] = 0
            runner.go.set()
            check(await task, tokens)

    run(test)


def test_a_name_is_one_documents_at_a_time() -> None:
    async def test() -> None:
        runner = CountingRunner()
        async with running(runner) as engine:
            following = await open_(engine, "a", NO_TOKENS, last=False)
            with pytest.raises(ValueError, match="open already"):
                await anext(engine.read("a", tokens_of(9), last=True))
            await engine.feed("a", 0, tokens_of(2), last=True)
            assert (await following).logits.tolist() == answer(tokens_of(2))
            check(await read(engine, "a", [tokens_of(9)]), tokens_of(9))

    run(test)


def test_feeding_waits_while_the_inbox_is_over_its_bound() -> None:
    async def test() -> None:
        runner = CountingRunner()
        async with running(runner, inbox_tokens=40) as engine:
            runner.pause()
            tokens = tokens_of(300)
            task = asyncio.create_task(read(engine, "a", [tokens[:16], *np.split(tokens[16:], 4)]))
            await runner.until_in_step()
            with pytest.raises(WrongOffset) as caught:
                await engine.feed("a", 0, tokens, last=True)
            assert caught.value.expected == 16 + 71, "the first feed was taken, and no other"
            runner.go.set()
            check(await task, tokens)

    run(test)


@pytest.mark.parametrize("how", ["abort", "overflow"])
def test_a_feeder_that_waits_hears_what_closed_its_document(how: str) -> None:
    async def test() -> None:
        runner = CountingRunner()
        async with running(runner, inbox_tokens=CHUNK) as engine:
            runner.pause()
            first = np.full(4, OVERFLOWS if how == "overflow" else 0, np.int32)
            following = await open_(engine, "a", first, last=False)
            await runner.until_in_step()
            feeding = asyncio.create_task(engine.feed("a", 4, tokens_of(400), last=True))
            await settle()
            assert not feeding.done()
            if how == "abort":
                engine.abort("a")
            runner.go.set()
            error = UnknownDocument if how == "abort" else StepFailed
            for task in (feeding, following):
                with pytest.raises(error):
                    await task

    run(test)


# Slow consumers.


@at_any_depth
def test_a_slow_consumer_loses_nothing_and_its_unread_evidence_is_bounded(depth: int) -> None:
    async def test() -> None:
        runner = free_running(depth)
        tokens = tokens_of(100 * CHUNK)
        async with running(runner, max_unread_spans=6) as engine:
            reading = engine.read("slow", tokens, last=True)
            progress = [await anext(reading)]
            for i in range(50):
                check(await read(engine, "other", [tokens_of(9, i)]), tokens_of(9, i))
            progress.append(await anext(reading))
            assert 6 <= len(progress[-1].spans) < 6 + ROWS
            progress += [each async for each in reading]
            check(progress, tokens)

    run(test)


def test_without_evidence_a_slow_consumer_holds_nothing_up() -> None:
    async def test() -> None:
        tokens = tokens_of(100 * CHUNK)
        async with running(CountingRunner(), max_unread_spans=6) as engine:
            reading = engine.read("slow", tokens, last=True, evidence=False)
            progress = [await anext(reading)]
            for i in range(50):
                check(await read(engine, "other", [tokens_of(9, i)]), tokens_of(9, i))
            progress.append(await anext(reading))
            assert progress[-1].done
            assert progress[-1].logits.tolist() == answer(tokens)
            assert not any(each.spans for each in progress)

    run(test)


@at_long_intervals
def test_between_the_first_and_the_last_progress_there_is_an_interval(
    interval_s: float | None,
) -> None:
    async def test() -> None:
        tokens = tokens_of(100 * CHUNK)
        async with running(CountingRunner()) as engine:
            reading = engine.read("a", tokens, last=True, interval_s=interval_s)
            progress = [each async for each in reading]
            assert len(progress) == 2
            check(progress, tokens)

    run(test)


@at_long_intervals
def test_an_interval_does_not_hold_a_document_that_has_much_evidence_unread(
    interval_s: float | None,
) -> None:
    async def test() -> None:
        tokens = tokens_of(100 * CHUNK)
        async with running(CountingRunner(), max_unread_spans=6) as engine:
            reading = engine.read("a", tokens, last=True, interval_s=interval_s)
            check([each async for each in reading], tokens)

    run(test)


@at_long_intervals
def test_a_failure_does_not_wait_for_the_interval(
    interval_s: float | None,
) -> None:
    async def test() -> None:
        async with running(CountingRunner()) as engine:
            reading = engine.read("a", tokens_of(CHUNK), last=False, interval_s=interval_s)
            await anext(reading)
            engine.abort("a")
            with pytest.raises(UnknownDocument):
                await anext(reading)

    run(test)


def test_memory_does_not_grow_with_the_document() -> None:
    async def peak(length: int) -> int:
        piece = tokens_of(2_000)
        runner = CountingRunner(chunk=64)
        runner.steps = deque(maxlen=1)
        async with running(runner, inbox_tokens=4_000) as engine:
            tracemalloc.start()
            reading = engine.read("a", piece, last=False, evidence=False)

            async def feed() -> None:
                for offset in range(len(piece), length, len(piece)):
                    await engine.feed("a", offset, piece, last=offset + len(piece) >= length)

            following = asyncio.ensure_future(anext(reading))
            await asyncio.sleep(0)
            feeding = asyncio.create_task(feed())
            await following
            async for _ in reading:
                pass
            await feeding
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return peak

    asyncio.run(peak(12_000))  # what Python allocates once
    short, long = asyncio.run(peak(12_000)), asyncio.run(peak(120_000))
    assert long < short + 20_000


# Failures.


def test_a_failed_step_fails_its_documents_and_no_later_one() -> None:
    async def test() -> None:
        runner = CountingRunner(slots=2)
        async with running(runner) as engine:
            runner.pause()
            doomed = [
                asyncio.create_task(read(engine, name, [np.array(tokens, np.int32)]))
                for name, tokens in (("culprit", [1, RAISES]), ("mate", [1, 2]))
            ]
            await runner.until_in_step()
            waiting = asyncio.create_task(read(engine, "waiting", [tokens_of(30)]))
            await settle()
            runner.go.set()
            for task in doomed:
                with pytest.raises(StepFailed, match="failed"):
                    await task
            assert engine.ready
            check(await waiting, tokens_of(30))
            await asyncio.gather(*(read(engine, str(i), [tokens_of(9)]) for i in range(9)))

    run(test)


def test_steps_that_fail_in_a_row_are_counted() -> None:
    async def test() -> None:
        async with running(CountingRunner()) as engine:
            for failures in (1, 2):
                with pytest.raises(StepFailed):
                    await read(engine, "a", [np.array([RAISES], np.int32)])
                assert engine.failed_steps == failures
            await read(engine, "b", [tokens_of(3)])
            assert engine.failed_steps == 0

    run(test)


def test_numbers_that_are_not_finite_fail_their_own_document() -> None:
    async def test() -> None:
        runner = CountingRunner()
        spoilt = tokens_of(40)
        spoilt[30] = OVERFLOWS
        async with running(runner) as engine:
            runner.pause()
            mates = [
                asyncio.create_task(read(engine, str(i), [tokens_of(40, i)])) for i in range(2)
            ]
            culprit = asyncio.create_task(read(engine, "culprit", [spoilt]))
            await settle()
            runner.go.set()
            with pytest.raises(StepFailed, match="not finite"):
                await culprit
            for i, mate in enumerate(mates):
                check(await mate, tokens_of(40, i))

    run(test)


# Stalling. Any document's work makes the engine look at the clock.


async def poke(engine: Engine) -> None:
    await read(engine, "poke", [tokens_of(1)])


def test_a_client_that_sends_nothing_more_is_dropped() -> None:
    async def test() -> None:
        clock = Clock()
        runner = CountingRunner(slots=2)
        async with running(runner, idle_timeout_s=30, clock=clock) as engine:
            resident = await open_(engine, "resident", tokens_of(CHUNK), last=False)
            waiting = await open_(engine, "waiting", tokens_of(1), last=False)
            await resident
            clock.now = 20
            await poke(engine)
            await engine.feed("waiting", 1, tokens_of(1), last=False)
            clock.now = 31
            await poke(engine)
            with pytest.raises(Stalled):
                await anext(resident.reading)  # type: ignore[attr-defined]
            with pytest.raises(UnknownDocument):
                await engine.feed("resident", CHUNK, tokens_of(1), last=True)
            clock.now = 49
            await poke(engine)
            assert not waiting.done()
            clock.now = 51
            await poke(engine)
            with pytest.raises(Stalled):
                await waiting
            assert runner.pool.in_use == 0

    run(test)


def test_a_client_that_consumes_nothing_more_is_dropped() -> None:
    async def test() -> None:
        clock = Clock()
        async with running(
            CountingRunner(), idle_timeout_s=30, clock=clock, max_unread_spans=1
        ) as engine:
            reading = engine.read("a", tokens_of(99), last=True)
            await anext(reading)
            await poke(engine)
            clock.now = 29
            await anext(reading)
            await poke(engine)
            clock.now = 58
            await poke(engine)
            await anext(reading)
            await poke(engine)
            clock.now = 90
            await poke(engine)
            with pytest.raises(Stalled):
                await anext(reading)

    run(test)


@pytest.mark.parametrize("length", [9, 99])
def test_a_client_that_the_engine_keeps_waiting_is_not_dropped(length: int) -> None:
    async def test() -> None:
        clock = Clock()
        runner = CountingRunner(slots=1)
        async with running(runner, idle_timeout_s=30, clock=clock) as engine:
            runner.pause()
            first = asyncio.create_task(read(engine, "first", [tokens_of(length)]))
            await runner.until_in_step()
            second = asyncio.create_task(read(engine, "second", [tokens_of(length)]))
            await settle()
            clock.now = 1000
            runner.go.set()
            check(await first, tokens_of(length))
            check(await second, tokens_of(length))

    run(test)


# Starting and stopping.


def test_stopping_ends_the_running_step_and_fails_the_rest() -> None:
    async def test() -> None:
        runner = CountingRunner(slots=1)
        async with running(runner) as engine:
            runner.pause()
            last_step = asyncio.create_task(read(engine, "last step", [tokens_of(3)]))
            await runner.until_in_step()
            rest = [
                asyncio.create_task(read(engine, str(i), pieces))
                for i, pieces in enumerate(
                    [[tokens_of(99)], [tokens_of(1), tokens_of(1), NO_TOKENS]]
                )
            ]
            await settle()
            stopping = asyncio.create_task(engine.stop())
            await settle()
            assert not stopping.done()
            assert not engine.ready
            with pytest.raises(ShuttingDown):
                await anext(engine.read("late", tokens_of(3), last=True))
            runner.go.set()
            await stopping
            check(await last_step, tokens_of(3))
            for task in rest:
                with pytest.raises((ShuttingDown, UnknownDocument)):
                    await task

    run(test)


def test_a_failed_warm_up_is_not_served() -> None:
    class Broken(CountingRunner):
        def warm_up(self) -> None:
            raise RuntimeError("weights are not finite")

    async def test() -> None:
        engine = Engine(Broken(), max_waiting=1, inbox_tokens=CHUNK, idle_timeout_s=1)
        with pytest.raises(RuntimeError, match="not finite"):
            await engine.start()
        assert not engine.ready
        with pytest.raises(NotReady):
            await anext(engine.read("a", tokens_of(3), last=True))
        await engine.stop()

    run(test)


def test_an_observer_that_raises_ends_the_engine_and_nobody_waits_for_ever() -> None:
    class Broken(Observer):
        def stepped(self, rows: int, grid_rows: int, tokens: int, seconds: float) -> None:
            raise ZeroDivisionError

    async def test() -> None:
        runner = CountingRunner()
        engine = Engine(
            runner, max_waiting=9, inbox_tokens=CHUNK, idle_timeout_s=1, observer=Broken()
        )
        await engine.start()
        with pytest.raises(ServiceError):
            await read(engine, "a", [tokens_of(99)])
        assert not engine.ready
        with pytest.raises(ZeroDivisionError):
            await engine.stop()

    run(test)


@pytest.mark.parametrize("options", [{"inbox_tokens": CHUNK - 1}, {"max_unread_spans": 0}])
def test_options_that_could_never_work_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Engine(
            CountingRunner(),
            **{"max_waiting": 1, "inbox_tokens": CHUNK, "idle_timeout_s": 1, **options},  # type: ignore[arg-type]
        )


# What it reports.


def test_time_in_the_queue_and_in_steps() -> None:
    async def test() -> None:
        clock = Clock()
        runner = CountingRunner(rows=1, clock=clock)
        async with running(runner, clock=clock) as engine:
            runner.pause()
            first = asyncio.create_task(read(engine, "first", [tokens_of(2 * CHUNK)]))
            await runner.until_in_step()
            second = asyncio.create_task(read(engine, "second", [tokens_of(2 * CHUNK)]))
            await settle()
            runner.go.set()
            for task in (first, second):
                final = (await task)[-1]
                assert (final.queue_s, final.compute_s) == (1 if task is first else 2, 2)

    run(test)


def test_time_in_steps_that_overlap_counts_once_and_waiting_behind_one_is_queueing() -> None:
    class Durations(Finished):
        seconds = 0.0

        def stepped(self, rows: int, grid_rows: int, tokens: int, seconds: float) -> None:
            self.seconds += seconds
            super().stepped(rows, grid_rows, tokens, seconds)

    async def test() -> None:
        clock = Clock()  # each step takes a second
        durations = Durations()
        runner = DeviceRunner(clock=clock)
        async with running(runner, clock=clock, observer=durations) as engine:
            book = asyncio.create_task(read(engine, "book", [marked(1, 2 * ROWS + 2)]))
            await runner.until_launched(2)
            mate = asyncio.create_task(read(engine, "mate", [marked(2, ROWS - 2)]))
            await settle()
            for _ in range(3):
                runner.end_step()
                await durations.steps.acquire()
            final = (await book)[-1]
            assert (final.queue_s, final.compute_s) == (0, 3)
            final = (await mate)[-1]
            assert (final.queue_s, final.compute_s) == (2, 1)
            assert durations.seconds == 3

    run(test)


def test_what_comes_while_its_document_is_read_does_not_count_as_queueing() -> None:
    async def test() -> None:
        clock = Clock()  # each step takes a second, and the second one waits for the client too
        runner = DeviceRunner(clock=clock)
        async with running(runner, clock=clock) as engine:
            following = await open_(engine, "a", marked(1, 2 * ROWS), last=False)
            await runner.until_launched(2)
            runner.end_step()
            await following
            clock.now += 1
            await engine.feed("a", 2 * FULL, marked(1, 1), last=True)
            runner.resume()
            *_, final = [each async for each in following.reading]  # type: ignore[attr-defined]
            assert (final.queue_s, final.compute_s) == (0, 4)

    run(test)


def test_observers_are_told_everything_once() -> None:
    class Tally(Observer):
        def __init__(self) -> None:
            self.tokens = self.rows = self.paid = self.failed = self.admissions = 0
            self.ended: list[tuple[Ending, int]] = []
            self.occupied = (0, 0)

        def occupancy(self, waiting: int, slots: int) -> None:
            self.occupied = (waiting, slots)

        def stepped(self, rows: int, grid_rows: int, tokens: int, seconds: float) -> None:
            self.tokens += tokens
            self.rows += rows
            self.paid += grid_rows

        def step_failed(self) -> None:
            self.failed += 1

        def admitted(self, seconds: float) -> None:
            self.admissions += 1

        def closed(self, how: Ending, progress: Progress) -> None:
            self.ended.append((how, progress.tokens))

    async def test() -> None:
        tally = Tally()
        runner = CountingRunner(slots=1)
        async with running(runner, observer=tally) as engine:
            await read(engine, "a", [tokens_of(3 * CHUNK)])
            assert (tally.tokens, tally.rows, tally.paid) == (3 * CHUNK, 3, 4)
            with pytest.raises(StepFailed):
                await read(engine, "b", [np.array([RAISES], np.int32)])
            resident = await open_(engine, "c", tokens_of(CHUNK), last=False)
            waiting = await open_(engine, "d", tokens_of(1), last=False)
            await resident
            assert tally.occupied == (1, 1)
            engine.abort("c")
            engine.abort("d")
            await asyncio.gather(waiting, return_exceptions=True)
            assert tally.occupied == (0, 0)
        assert tally.ended == [
            ("done", 3 * CHUNK),
            ("failed", 0),
            ("aborted", CHUNK),
            ("aborted", 0),
        ]
        assert (tally.failed, tally.admissions) == (1, 3)

    run(test)
