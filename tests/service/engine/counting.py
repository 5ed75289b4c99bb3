"""Runners that count instead of thinking: their answers can be compared exactly."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from gma.model.grid import Grid
from gma.service.engine.opening import Tokens
from gma.service.engine.snapshot import Part, Parts, Snapshot
from gma.service.engine.step import Batch, Ended, Launched, Outcome
from gma.service.observe.memory import Memory

CHUNK = 4
ROWS = 4
FULL = ROWS * CHUNK
RAISES = 998  # a token that makes its step raise
OVERFLOWS = 999  # a token that makes its row NaN
COMPONENTS = 3
PATIENCE_S = 10


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class CountingRunner:
    """Labels: the mean of the tokens, and a sum that depends on where each one stands. Components,
    of one head of one layer: ids that leave the same remainder.

    Checks what every runner relies on, and never clears a slot: what `fresh` does not reset stays.
    The numbers of an outcome are wrong as soon as a runner may overwrite them.
    """

    backend, device, vocab_size = "counting", "cpu", 1000
    dtype, kernels = "int64", "none"
    versions: ClassVar[Mapping[str, str]] = {}
    depth = 1
    counts = True
    passes, pages = 1, 0
    state_bytes = 0

    def __init__(
        self, *, slots: int = 8, rows: int = ROWS, chunk: int = CHUNK, clock: Clock | None = None
    ) -> None:
        self.grids = [Grid(r, chunk) for r in (1, 2, 4, 8) if r <= rows]
        self.slots = slots
        self.sums = np.full((slots + 1, 3), np.nan)  # read, total, ordered
        self.steps: deque[Batch] = deque()
        self.outcomes: deque[Outcome] = deque()
        self.threads: set[int] = set()
        self.clock = clock
        self.entered = threading.Event()
        self.go = threading.Event()
        self.go.set()

    @property
    def parts(self) -> Parts:
        return {"sums": Part((3,), self.sums.dtype)}

    def snapshot(self, slot: int) -> Callable[[], Snapshot]:
        self.threads.add(threading.get_ident())
        snapshot = {"sums": self.sums[slot : slot + 1].copy()}
        return lambda: snapshot

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        self.threads.add(threading.get_ident())
        self.sums[slot] = snapshot["sums"][0]

    def memory(self) -> Memory:
        return Memory(0, 0, 0, 0)

    def warm_up(self) -> None:
        self.threads.add(threading.get_ident())

    def launch(self, batch: Batch) -> Launched:
        self.take(batch)
        self.entered.set()
        assert self.go.wait(PATIENCE_S)
        self.end(batch)
        return Ended(self.count(batch))

    def take(self, batch: Batch) -> None:
        self.threads.add(threading.get_ident())
        self.steps.append(batch)
        check_layout(batch, scratch=self.slots)

    def end(self, batch: Batch) -> None:
        if self.clock:
            self.clock.now += 1
        if RAISES in batch.tokens:
            raise RuntimeError("the device has had enough")

    def count(self, batch: Batch) -> Outcome:
        outcome = self.blank(len(batch.lengths), count=batch.count)
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
            if outcome.usage is not None:
                outcome.usage[row, 0, 0] = used(tokens)
            sums[document] += share
            outcome.evidence[row], outcome.weight[row] = share[1:], length
        self.sums[batch.slot_of_document] = sums
        with np.errstate(invalid="ignore"):
            outcome.logits[:] = sums[:, 1:] / sums[:, :1]
        return outcome

    def blank(self, rows: int, *, count: bool) -> Outcome:
        """A step's answer to be filled. The one that was handed out longest ago is spoilt."""
        if len(self.outcomes) == self.depth:
            overwritten = self.outcomes.popleft()
            for numbers in vars(overwritten).values():
                if numbers is not None:
                    numbers.fill(-1)
        self.outcomes.append(
            Outcome(
                np.zeros((rows, 2), np.float32),
                np.zeros(rows, np.float32),
                np.zeros((rows, 2)),
                np.zeros((rows, 1, 1, COMPONENTS), np.float32) if count else None,
            )
        )
        return self.outcomes[-1]

    async def until_in_step(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, PATIENCE_S)

    def pause(self) -> None:
        self.entered.clear()
        self.go.clear()

    def resume(self) -> None:
        self.go.set()


class PassingRunner(CountingRunner):
    """Reads whole documents several times, and says nothing before the last.

    Checks what every such runner relies on: each pass finds every chunk of a document in the page
    where the pass before left it, so that no page is another's meanwhile.
    """

    passes = 3

    def __init__(self, *, pages: int, **options: Any) -> None:
        super().__init__(**options)
        self.pages = pages
        self.left: dict[int, tuple[int, int, bytes]] = {}  # by page: slot, pass, tokens

    def count(self, batch: Batch) -> Outcome:
        outcome = super().count(batch)
        for row in np.flatnonzero(batch.lengths):
            document = batch.document_of_row[row]
            slot, passes = int(batch.slot_of_document[document]), batch.passes_of(document)
            assert len(passes) == 1 or (batch.fresh[document] and passes[-1] == self.passes - 1)
            page, tokens = int(batch.page_of_row[row]), batch.tokens[row].tobytes()
            if passes[0]:
                assert self.left[page] == (slot, passes[0] - 1, tokens)
            self.left[page] = slot, passes[-1], tokens
            if outcome.usage is not None and 0 not in passes:
                outcome.usage[row] = 0  # its only layer is written in the first
            if passes[-1] < self.passes - 1:
                outcome.evidence[row], outcome.weight[row] = 0, 0
                outcome.logits[document] = np.where(
                    np.isfinite(outcome.logits[document]), 0, np.nan
                )
        return outcome


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
        busy = {slot for other in self.in_flight for slot in other.slot_of_document.tolist()}
        given = {*batch.slot_of_document[batch.fresh].tolist()} - {self.slots}
        assert not given & busy, "a slot was given to another under a step in flight"
        self.in_flight.append(batch)
        assert len(self.in_flight) <= self.depth
        self.launches.release()
        return Flying(self, batch, self.count(batch))

    async def until_launched(self, steps: int) -> None:
        """So many more than were waited for before."""
        for _ in range(steps):
            assert await asyncio.to_thread(self.launches.acquire, timeout=PATIENCE_S)

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
        assert self.runner.ends.acquire(timeout=PATIENCE_S)
        assert self.runner.in_flight.popleft() is self.batch
        self.runner.end(self.batch)
        return self.result


def free_running(depth: int, **options: Any) -> CountingRunner:
    return CountingRunner(**options) if depth == 1 else DeviceRunner(held=False, **options)


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


NO_TOKENS = tokens_of(0)


def answer(tokens: Tokens) -> list[float]:
    """The logits of a document."""
    places = np.arange(len(tokens)) % 97 + 1
    return [tokens.sum() / len(tokens), (tokens * places).sum() / len(tokens)]


def used(tokens: Tokens) -> list[int]:
    """What each component takes of a document."""
    return [int((tokens % COMPONENTS == component).sum()) for component in range(COMPONENTS)]


def marked(mark: int, chunks: int) -> Tokens:
    """Tokens by which a document's rows are known."""
    return np.full(chunks * CHUNK, mark, np.int32)


def marks(batch: Batch) -> list[int]:
    """What stands in the rows of a step, unused ones left out."""
    return [int(row[0]) for row in batch.tokens[batch.lengths > 0]]
