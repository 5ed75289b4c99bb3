"""Continuous batching: documents come and go, and each step reads chunks of as many as it can.

The life of a document: `open` takes it; with its first chunk ready it gets a slot; the scheduler
gives it rows of a step whenever it has chunks ready; after each such step its client hears how far
it is; with the last token read it is done and its slot is free. It may fail or be aborted at any
time, but a slot is never given back under a step in flight.

All of this happens on one event loop's thread. One other thread launches steps, and a third waits
for their ends. With a runner of depth 2, a step is launched while the one before it runs, so the
device need not wait for the loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gma.service.engine.document import Before, Document, Heard, Terms
from gma.service.engine.observer import Ending, Observer, Queue
from gma.service.engine.opening import Opening
from gma.service.engine.pace import Pace
from gma.service.engine.patience import Patience
from gma.service.engine.places import Places
from gma.service.engine.progress import RowShares
from gma.service.engine.scheduler import schedule
from gma.service.engine.snapshot import Snapshot, decoded
from gma.service.engine.step import Batch, Launched, Outcome, Runner, fitting
from gma.service.errors import (
    Empty,
    NoSessions,
    NotReady,
    Overloaded,
    ServiceError,
    SessionGone,
    ShuttingDown,
    Stalled,
    StepFailed,
    Validation,
    retry_after,
)

logger = logging.getLogger(__name__)

Plan: TypeAlias = list[tuple[Document, int]]
"""The documents of a step, and how many tokens of each."""


class StepInFlight(NamedTuple):
    """A step that was launched, and whose documents were not told yet what it said."""

    plan: Plan
    batch: Batch
    launched_at: float
    outcome: asyncio.Future[tuple[Outcome, Mapping[int, Snapshot]]]
    """With the states that are kept, by the index of their document."""

    @property
    def rows(self) -> int:
        """The rows that it pays for, used or not."""
        return len(self.batch.lengths)


class Engine:
    """Reads many documents at once with one runner."""

    def __init__(
        self,
        runner: Runner,
        *,
        max_waiting: int,
        inbox_tokens: int,
        idle_timeout_s: float,
        interval_s: float = 0.0,
        max_unread_rows: int = 1024,
        model: str = "",
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        max_waiting: documents that may be open without a slot; more are Overloaded.
        inbox_tokens: what a document may have queued before `feed` waits. At least a chunk; two
            full grids let a document that is alone fill every step. Where documents are read
            several times they are kept whole, as long as there are pages.
        idle_timeout_s: how long the engine waits for a client that neither feeds nor listens.
        interval_s: least time between two Progress of one document.
        max_unread_rows: evidence that may lie unread before its document is held.
        model: fingerprint of the runner's model, which states of its documents belong to.
        """
        self._grid = runner.grids[-1]
        if inbox_tokens < self._grid.chunk:
            raise ValueError(f"inbox_tokens must be at least a chunk, {self._grid.chunk}")
        if runner.slots < 1:
            raise ValueError(f"{runner.slots} slots: at least one document must fit")
        if max_unread_rows < 1:
            raise ValueError("max_unread_rows must be at least 1, or nothing could be read")
        self._runner = runner
        self._model = model
        self._max_waiting = max_waiting
        self._places = Places(runner.slots, runner.pages)
        chunk, passes = self._grid.chunk, runner.passes
        self.most_tokens = self._places.longest * chunk if passes > 1 else None
        """Of a document; None if it is not kept whole."""
        self._inbox_tokens = inbox_tokens
        inbox = self.most_tokens or inbox_tokens
        self._terms = Terms(
            runner.vocab_size,
            chunk,
            passes,
            inbox,
            max_unread_rows,
            interval_s,
            model,
            keeps=runner.parts is not None,
        )
        self._observer = observer or Observer()
        self._clock = clock

        # As ordered sets.
        self._waiting: dict[Document, None] = {}  # without a slot, in order of arrival
        self._resident: dict[Document, None] = {}  # with a slot, in order of admission
        self._steps = 0  # launched
        self._in_flight: deque[StepInFlight] = deque()  # in order of launch
        self._pace = Pace(clock())
        self._patience = Patience(idle_timeout_s, clock())
        self._wake = asyncio.Event()
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._outcomes = ThreadPoolExecutor(1, thread_name_prefix="outcomes")
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self.failed_steps = 0
        """Since the last one that did not fail."""

    @property
    def ready(self) -> bool:
        """Warm, and taking documents."""
        return self._task is not None and not self._stopping

    def queue(self) -> Queue:
        """What waits now; to be called on the event loop's thread.

        A document that is kept whole counts no more than another could have queued: no second
        worker would read it sooner.
        """
        now = self._clock()
        left = (document.left for document in self._open_documents())
        return Queue(
            sum(min(tokens, self._inbox_tokens) if self.most_tokens else tokens for tokens in left),
            max((document.ready_for(now) for document in self._waiting), default=0.0),
        )

    async def start(self) -> None:
        """Warm up, then begin to step. Raises what the warm-up raises: never serve after that."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._compute, self._runner.warm_up)
        self._task = asyncio.create_task(self._run(), name="engine")

    async def stop(self) -> None:
        """Let the steps in flight end; documents not done by then fail with ShuttingDown."""
        self._stopping = True
        self._wake.set()
        try:
            if self._task:
                await self._task
        finally:
            self._compute.shutdown()
            self._outcomes.shutdown()

    def open(self, opening: Opening) -> Document:
        """Take a document; it is read until it is closed.

        Raises ShuttingDown, NotReady, Validation, Empty, TooLong, NoSessions, SessionGone or
        Overloaded, and ValueError for what are no tokens; nothing of it was read then.
        """
        if self._stopping:
            raise ShuttingDown("the service is stopping: send the document elsewhere")
        if not self.ready:
            raise NotReady("the service is warming up: try again")
        if opening.components and not self._runner.counts:
            raise Validation(
                "components: the model as it runs here does not count them: leave the option out"
            )
        before = self._before(opening)
        document = Document(opening, self, self._terms, self._clock(), before)
        self._waiting[document] = None
        # One that gave its slot away waits too, and counts.
        full = len(self._open_documents()) > self._runner.slots + self._max_waiting
        if not full:
            self._seat()
        if full or (len(self._waiting) > self._max_waiting and not document.resident):
            del self._waiting[document]
            self._observe_occupancy()
            self._observer.refused()
            raise Overloaded(
                f"{self._max_waiting} documents are waiting: try again later",
                retry_after(self._pace.seconds_for(self.queue().tokens)),
            )
        return document

    def _before(self, opening: Opening) -> Before | None:
        """The state that a document goes on from, checked: one that is wrong would fail all of a
        step."""
        parts, past = self._runner.parts, opening.past
        if parts is None and (opening.steady or past):
            raise NoSessions(
                "what runs the model here gives no states: serve a checkpoint, or send whole "
                "documents"
            )
        if past is None:
            return None
        if past.model != self._model:
            raise SessionGone("the session was read by another model than runs now")
        if not past.snapshot:
            return None
        assert parts
        try:
            snapshot = decoded(past.snapshot, parts)
        except ValueError as error:
            raise SessionGone(f"the session's state can't be read on: {error}") from None
        return lambda: snapshot

    # The loop: schedule, launch, finish.

    async def _run(self) -> None:
        try:
            while self._in_flight or not self._stopping:
                self._wake.clear()
                self._drop_stalled()
                if plan := self._schedule():
                    self._launch(plan)
                elif self._in_flight and self._in_flight[0].outcome.done():
                    self._finish(self._in_flight.popleft())
                else:
                    await self._idle()
        except Exception:
            logger.critical("the engine's loop failed", exc_info=True)
            raise
        finally:
            self._stopping = True
            for document in self._open_documents():
                error = ShuttingDown("the service is stopping: send the document again")
                self.close(document, "failed", error)

    def _schedule(self) -> Plan:
        """What to launch now, if anything.

        While a step is in flight only a full grid is launched behind it, and only when that is
        about to end. Anything less waits for its end: what comes meanwhile can then join, and does
        not wait for two steps.
        """
        if self._stopping or len(self._in_flight) == self._runner.depth or self._too_early():
            return []
        runnable = [document for document in self._resident if document.runnable]
        plan = schedule(runnable, self._grid.rows, self._grid.chunk)
        full = sum(self._rows(tokens) for _, tokens in plan) == self._grid.rows
        return plan if full or not self._in_flight else []

    def _too_early(self) -> bool:
        return bool(self._in_flight) and self._clock() < self._launch_at()

    def _launch_at(self) -> float:
        running = self._in_flight[0]
        return self._pace.next_launch(running.launched_at, running.rows)

    def _launch(self, plan: Plan) -> None:
        kept = {i: document.slot for i, (document, n) in enumerate(plan) if document.keeps(n)}
        restored = {each.slot: each.before for each, _ in plan if each.before is not None}
        batch = self._batch(plan)
        launched_at = self._clock()
        launching = self._compute.submit(self._begin, batch, restored, kept)

        def ended() -> tuple[Outcome, Mapping[int, Snapshot]]:
            launched, snapshots = launching.result()
            outcome = launched.outcome()
            return outcome, {index: snapshot() for index, snapshot in snapshots.items()}

        outcome = asyncio.get_running_loop().run_in_executor(self._outcomes, ended)
        outcome.add_done_callback(lambda _: self._wake.set())
        self._in_flight.append(StepInFlight(plan, batch, launched_at, outcome))

    def _begin(
        self, batch: Batch, restored: Mapping[int, Before], kept: Mapping[int, int]
    ) -> tuple[Launched, Mapping[int, Callable[[], Snapshot]]]:
        """Launch a step, with what is to be in some slots before, by slot; and take out what is to
        be kept of it, of some documents' slots. In the thread that computes."""
        for slot, snapshot in restored.items():
            self._runner.restore(slot, snapshot())
        launched = self._runner.launch(batch)
        return launched, {index: self._runner.snapshot(slot) for index, slot in kept.items()}

    def _batch(self, plan: Plan) -> Batch:
        """Take the planned tokens out of the documents' inboxes."""
        self._steps += 1
        chunk, rows = self._grid.chunk, sum(self._rows(tokens) for _, tokens in plan)
        batch = Batch.blank(
            fitting(self._runner.grids, rows),
            self._runner.slots,
            count=any(document.components for document, _ in plan),
        )
        for index, (document, tokens, own) in enumerate(self._placed(plan)):
            batch.slot_of_document[index] = document.slot
            batch.fresh[index] = document.fresh
            batch.first_pass[index] = document.pass_number
            batch.last_pass[index] = document.last_pass(tokens)
            if document.pages:
                batch.page_of_row[own] = document.next_pages(own.stop - own.start)
            batch.document_of_row[own] = index
            batch.lengths[own] = chunk
            batch.lengths[own.stop - 1] = tokens - (own.stop - own.start - 1) * chunk
            document.take(batch.tokens[own], tokens, self._steps)
        return batch

    def _finish(self, step: StepInFlight) -> None:
        """Tell the documents of a step that ended."""
        now, began = self._clock(), self._pace.began(step.launched_at)
        self._pace.ended(now)
        try:
            outcome, snapshots = step.outcome.result()
        except Exception as error:
            self._fail(step, error, began, now)
            return
        tokens = step.batch.tokens_read / self._runner.passes
        self._pace.learn(step.rows, tokens, now - began)
        self._hand_out(step, outcome, snapshots, began, now)
        if self._waiting:
            self._seat()  # of the step's documents some may have no chunk ready now
        used = np.count_nonzero(step.batch.lengths)
        self._observer.stepped(int(used), step.rows, tokens, now - began)

    def _hand_out(
        self,
        step: StepInFlight,
        outcome: Outcome,
        snapshots: Mapping[int, Snapshot],
        began: float,
        now: float,
    ) -> None:
        """Give each document of the step what it said."""
        self.failed_steps = 0
        lengths = step.batch.lengths.astype(np.int32)
        shares = RowShares(lengths, outcome.weight.astype(np.float64), outcome.evidence)
        finite: NDArray[np.bool_] = outcome.finite
        certain: NDArray[np.bool_] = np.all(np.isfinite(outcome.logits), axis=1)
        for index, (document, _, own) in enumerate(self._placed(step.plan)):
            heard = Heard(own, began, now, step.batch.passes_of(index))
            if document.closed:
                document.end_step(heard)
                self._release(document)
            elif certain[index] and finite[own].all():
                if document.components and outcome.usage is not None:
                    document.count(outcome.usage[own])
                ended = document.hear(heard, outcome.logits[index], shares)
                if index in snapshots:
                    document.keep(snapshots[index])
                if ended:
                    self._leave(document, "done")
            else:
                document.end_step(heard)
                error = StepFailed("reading the document gave numbers that are not finite")
                self._observer.not_finite()
                self.close(document, "failed", error)

    def _fail(self, step: StepInFlight, error: Exception, began: float, now: float) -> None:
        """Close the documents of a step that raised: nobody knows what is in their slots."""
        names = [document.name for document, _ in step.plan]
        fields = {"fields": {"documents": names}}
        logger.error("a step with %d documents failed", len(names), exc_info=error, extra=fields)
        self.failed_steps += 1
        self._observer.step_failed()
        for index, (document, _, own) in enumerate(self._placed(step.plan)):
            document.end_step(Heard(own, began, now, step.batch.passes_of(index)))
            if document.closed:
                self._release(document)
            else:
                failure = StepFailed("reading the document failed: send it again")
                self.close(document, "failed", failure)

    async def _idle(self) -> None:
        """Wait until a client does something, a step ends, or it is time for another, or to see who
        stalls."""
        until = self._patience.ends_at
        if len(self._in_flight) < self._runner.depth and self._too_early():
            until = min(until, self._launch_at())
        with suppress(TimeoutError):
            async with asyncio.timeout(until - self._clock()):
                await self._wake.wait()

    def _drop_stalled(self) -> None:
        now = self._clock()
        if now < self._patience.ends_at:
            return
        for document in self._patience.stalled(self._open_documents(), now):
            error = Stalled(f"the client did nothing for {self._patience.timeout_s:g} s")
            self.close(document, "failed", error)

    # Documents and their slots.

    def changed(self, document: Document) -> None:
        """See `Owner.changed`."""
        if document.closed:
            return
        document.touch(self._clock())
        if document.runnable:
            if not document.resident:
                self._seat()
            self._wake.set()
        elif document.complete and not document.fed:
            self.close(document, "failed", Empty())
        elif document.done:
            self.close(document, "done")

    def _seat(self) -> None:
        """Give what is free to those that wait with a chunk ready, and then the slots of those that
        have none ready."""
        while True:
            ready = [each for each in self._waiting if each.runnable and not self._stopping]
            seated = list(self._places.admit(ready))
            for document in seated:
                del self._waiting[document]
                self._resident[document] = None
                document.served = self._steps - 1
                self._observer.admitted(document.ready_for(self._clock()))
                self._wake.set()
            if not self._park(len(ready) - len(seated)):
                break
        self._observe_occupancy()

    def _park(self, count: int) -> bool:
        """Take their slots from up to `count` documents that have no chunk ready, longest idle
        first: a slow client's must not keep others waiting. Returns whether there were any."""
        if not (count and self._terms.keeps):
            return False
        idle = [each for each in self._resident if not (each.runnable or each.stepping)]
        idle.sort(key=lambda document: document.touched_at)
        for document in idle[:count]:
            # Before any step that is launched from now on.
            taken = self._compute.submit(self._runner.snapshot, document.slot)
            document.before = partial(_state, taken)
            del self._resident[document]
            self._waiting[document] = None
            self._places.leave(document)
        return bool(idle)

    def close(self, document: Document, how: Ending, error: ServiceError | None = None) -> None:
        """See `Owner.close`."""
        if not document.closed:
            document.end(error)
            self._leave(document, how)

    def _leave(self, document: Document, how: Ending) -> None:
        """Forget a document that has ended."""
        del (self._resident if document.resident else self._waiting)[document]
        self._release(document)
        self._observer.closed(how, document.read)
        self._observe_occupancy()

    def _release(self, document: Document) -> None:
        """Give a closed document's place to those that wait.

        Under a step in flight with rows of the document it stays: the step's end calls again.
        """
        if not document.resident or document.stepping:
            return
        self._places.leave(document)
        self._seat()

    def _open_documents(self) -> list[Document]:
        return [*self._waiting, *self._resident]

    def _observe_occupancy(self) -> None:
        self._observer.occupancy(len(self._waiting), *self._places.in_use)

    def _placed(self, plan: Plan) -> Iterator[tuple[Document, int, slice]]:
        """A step's documents, how many tokens of each, and which rows of the step they fill."""
        first = 0
        for document, tokens in plan:
            yield document, tokens, slice(first, first := first + self._rows(tokens))

    def _rows(self, tokens: int) -> int:
        """How many rows so many tokens of a document take."""
        return -(-tokens // self._grid.chunk)


def _state(taken: Future[Before]) -> Snapshot:
    """What was taken out of a slot."""
    return taken.result()()
