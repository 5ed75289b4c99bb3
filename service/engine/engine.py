"""Continuous batching: documents come and go, and each step reads chunks of as many as it can.

The life of a document: `read` opens it; with its first chunk ready it takes a slot; the scheduler
gives it rows of a step whenever it has chunks ready; after each such step its reader gets Progress;
with the last token read it is done and gives its slot back. It may fail or be aborted at any time,
but a slot is never given back under a step in flight.

All of this happens on one event loop's thread. One other thread launches steps, and a third waits
for their ends. With a runner of depth 2, a step is launched while the one before it runs, so the
device need not wait for the loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gma.service.engine.document import NO_SLOT, Document, Progress, Span
from gma.service.engine.scheduler import schedule
from gma.service.engine.step import Batch, Outcome, Runner, fitting
from gma.service.errors import (
    EmptyDocument,
    NotReady,
    Overloaded,
    ServiceError,
    ShuttingDown,
    Stalled,
    StepFailed,
    UnknownDocument,
)

__all__ = ["Engine", "Observer", "Progress", "Queue", "Span"]

logger = logging.getLogger(__name__)

LEAD_S = 0.003
"""How long before a step should end the next is launched: what the loop and a launch may take. More
lets what comes meanwhile wait for one more step."""

Tokens: TypeAlias = NDArray[np.integer]
Plan: TypeAlias = list[tuple[Document, int]]
"""The documents of a step, and how many tokens of each."""
Ending: TypeAlias = Literal["done", "failed", "aborted"]


class Queue(NamedTuple):
    """What waits in an engine."""

    tokens: int
    """Those that no step has read, of all open documents."""

    head_s: float
    """How long the longest wait for a slot has lasted; 0 if none with a chunk ready waits."""


class Observer:
    """What the engine tells those who count. Every method is called on the event loop's thread, and
    does nothing unless overridden."""

    def occupancy(self, waiting: int, slots: int) -> None:
        """So many documents are open without a slot, and so many slots in use."""

    def refused(self) -> None:
        """A document was Overloaded."""

    def admitted(self, seconds: float) -> None:
        """A document took a slot, so long after its first chunk was ready."""

    def stepped(self, rows: int, grid_rows: int, tokens: int, seconds: float) -> None:
        """A step read `tokens` in `rows` of the `grid_rows` rows that it paid for.

        `seconds` are its own: from its launch or the end of the step before, whichever came later.
        """

    def step_failed(self) -> None:
        """A step raised; its documents are lost."""

    def not_finite(self) -> None:
        """A document failed for numbers that are not finite."""

    def closed(self, how: Ending, progress: Progress) -> None:
        """A document ended; `progress` is what was read of it, without spans."""


@dataclass(frozen=True)
class _Step:
    """A step in flight: launched, and its documents were not told yet what it said."""

    plan: Plan
    batch: Batch
    launched_at: float
    outcome: asyncio.Future[Outcome]


class Engine:
    """Reads many documents at once with one runner."""

    def __init__(
        self,
        runner: Runner,
        *,
        max_waiting: int,
        inbox_tokens: int,
        idle_timeout_s: float,
        max_unread_spans: int = 1024,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        max_waiting: documents that may be open without a slot; more are Overloaded.
        inbox_tokens: what a document may have waiting before `feed` waits. At least a chunk; two
            full grids let a document that is alone fill every step.
        idle_timeout_s: how long the engine waits for a client that neither feeds nor consumes.
        max_unread_spans: evidence that may lie unread before its document is held.
        """
        self._grids = runner.grids
        self._grid = runner.grids[-1]
        if inbox_tokens < self._grid.chunk:
            raise ValueError(f"inbox_tokens must be at least a chunk, {self._grid.chunk}")
        if max_unread_spans < 1:
            raise ValueError("max_unread_spans must be at least 1, or nothing could be read")
        self._runner = runner
        self._pool = runner.pool
        self._max_waiting = max_waiting
        self._inbox_tokens = inbox_tokens
        self._idle_timeout_s = idle_timeout_s
        self._max_unread_spans = max_unread_spans
        self._observer = observer or Observer()
        self._clock = clock

        self._waiting: dict[str, Document] = {}  # without a slot, in order of arrival
        self._resident: dict[str, Document] = {}  # with a slot, in order of admission
        self._steps = 0  # launched
        self._in_flight: deque[_Step] = deque()  # in order of launch
        self._ended_at = clock()  # when the last step did
        self._seconds: dict[int, float] = {}  # of the last step on so many rows
        self._stall_check_at = clock()
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
        """What waits now; to be called on the event loop's thread."""
        now = self._clock()
        return Queue(
            sum(document.waiting for document in self._open_documents()),
            max((document.ready_for(now) for document in self._waiting.values()), default=0.0),
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

    # What clients call.

    async def read(
        self,
        document: str,
        tokens: Tokens,
        last: bool,
        *,
        evidence: bool = True,
        interval_s: float | None = 0.0,
    ) -> AsyncGenerator[Progress]:
        """Open a document with its first tokens, (n,) ids; yield Progress as steps read it.

        The first comes at once, as does the last, which is `done`; between two there are
        `interval_s`, or less where much evidence waits; with None there are none between those but
        where it does. A slow consumer loses nothing: what it did not take is in the next one. With
        `evidence`, spans that wait for it are bounded, and its document is not read on beyond;
        without, none are kept. The document lives as long as the generator: closing or cancelling
        it aborts the document. Raises Overloaded before anything is read, or whatever closed the
        document.
        """
        opened = self._open(document, tokens, last, evidence)
        pause_s: float | None = 0.0
        try:
            while True:
                progress = await opened.progress(pause_s)
                pause_s = interval_s
                self._touch(opened)
                yield progress
                if progress.done:
                    break
        finally:
            self._abort(opened)

    async def feed(self, document: str, offset: int, tokens: Tokens, last: bool) -> None:
        """Add tokens, (n,) ids, to an open document; `offset` is how many came before.

        They are taken at once; then the call lasts while more than `inbox_tokens` wait to be read.
        Raises UnknownDocument, WrongOffset, or whatever closed the document meanwhile.
        """
        opened = self._find(document)
        if opened is None:
            raise UnknownDocument(f"document {document} is not open here: send it from its start")
        opened.append(offset, self._checked(tokens), last)
        self._touch(opened)
        if opened.complete and not opened.fed:
            self._close(opened, "failed", EmptyDocument())
        elif opened.done:
            self._close(opened, "done")
        await opened.room(self._inbox_tokens)

    def abort(self, document: str) -> None:
        """Close a document, whatever it is at; its reader gets UnknownDocument.

        Does nothing for a document that is not open.
        """
        opened = self._find(document)
        if opened:
            self._abort(opened)

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
                self._close(document, "failed", error)

    def _schedule(self) -> Plan:
        """What to launch now, if anything.

        While a step is in flight only a full grid is launched behind it, and only when that is
        about to end. Anything less waits for its end: what comes meanwhile can then join, and does
        not wait for two steps.
        """
        if self._stopping or len(self._in_flight) == self._runner.depth or self._too_early():
            return []
        runnable = [document for document in self._resident.values() if document.runnable]
        plan = schedule(runnable, self._grid.rows, self._grid.chunk)
        full = sum(self._rows(tokens) for _, tokens in plan) == self._grid.rows
        return plan if full or not self._in_flight else []

    def _too_early(self) -> bool:
        return bool(self._in_flight) and self._clock() < self._launch_at()

    def _launch_at(self) -> float:
        """When the step behind the one that runs should be launched."""
        running = self._in_flight[0]
        began = max(running.launched_at, self._ended_at)
        return began + self._seconds.get(len(running.batch.lengths), 0.0) - LEAD_S

    def _launch(self, plan: Plan) -> None:
        batch = self._fill(plan)
        launched_at = self._clock()
        launching = self._compute.submit(self._runner.launch, batch)
        outcome = asyncio.get_running_loop().run_in_executor(
            self._outcomes, lambda: launching.result().outcome()
        )
        outcome.add_done_callback(lambda _: self._wake.set())
        self._in_flight.append(_Step(plan, batch, launched_at, outcome))

    def _fill(self, plan: Plan) -> Batch:
        """Move the planned tokens from the inboxes into a batch."""
        rows = sum(self._rows(tokens) for _, tokens in plan)
        batch = Batch.blank(fitting(self._grids, rows), self._pool.scratch)
        self._steps += 1
        row = 0
        for index, (document, tokens) in enumerate(plan):
            batch.slot_of_document[index] = document.slot
            batch.fresh[index] = document.fresh
            document.begin_step(self._steps)
            for _ in range(0, tokens, self._grid.chunk):
                batch.document_of_row[row] = index
                batch.lengths[row] = document.take(batch.tokens[row])
                row += 1
        return batch

    def _finish(self, step: _Step) -> None:
        """Tell the documents of a step that ended."""
        now = self._clock()
        began = max(step.launched_at, self._ended_at)
        self._ended_at = now
        for document, tokens in step.plan:
            document.end_step(self._rows(tokens), began, now)
            if document.closed:
                self._release(document)
        try:
            outcome = step.outcome.result()
        except Exception:
            names = [document.name for document, _ in step.plan]
            logger.exception(
                "a step with %d documents failed",
                len(names),
                extra={"fields": {"documents": names}},
            )
            self._fail(step.plan)
        else:
            self._seconds[len(step.batch.lengths)] = now - began
            self._hand_out(step.plan, step.batch, outcome)
            self._report(step.batch, now - began)

    def _hand_out(self, plan: Plan, batch: Batch, outcome: Outcome) -> None:
        """Give each document of the step what it said."""
        self.failed_steps = 0
        finite: NDArray[np.bool_] = outcome.finite
        certain: NDArray[np.bool_] = np.all(np.isfinite(outcome.logits), axis=1)
        after = 0
        for index, (document, tokens) in enumerate(plan):
            rows = slice(after, after := after + self._rows(tokens))
            if document.closed:
                continue
            if not (certain[index] and finite[rows].all()):
                error = StepFailed("reading the document gave numbers that are not finite")
                self._observer.not_finite()
                self._close(document, "failed", error)
                continue
            document.add(tokens, self._rows(tokens), outcome.logits[index].copy())
            if document.keeps_spans:
                document.keep(_spans(batch, outcome, rows))
            if document.done:
                self._close(document, "done")

    def _fail(self, plan: Plan) -> None:
        """Close the documents of a step that raised: nobody knows what is in their slots."""
        self.failed_steps += 1
        self._observer.step_failed()
        for document, _ in plan:
            error = StepFailed("reading the document failed: send it again")
            self._close(document, "failed", error)

    async def _idle(self) -> None:
        """Wait until a client does something, a step ends, or it is time for another, or to see who
        stalls."""
        until = self._stall_check_at
        if len(self._in_flight) < self._runner.depth and self._too_early():
            until = min(until, self._launch_at())
        with suppress(TimeoutError):
            async with asyncio.timeout(until - self._clock()):
                await self._wake.wait()

    def _drop_stalled(self) -> None:
        """Fail the documents whose client the engine has been waiting for too long."""
        now = self._clock()
        if now < self._stall_check_at:
            return
        # Whoever is waited for only later cannot stall before this either.
        self._stall_check_at = now + self._idle_timeout_s
        for document in self._open_documents():
            if document.runnable or document.stepping:
                continue
            stalls_at = document.touched_at + self._idle_timeout_s
            if stalls_at > now:
                self._stall_check_at = min(self._stall_check_at, stalls_at)
            else:
                error = Stalled(f"the client did nothing for {self._idle_timeout_s:g} s")
                self._close(document, "failed", error)

    # Documents and their slots. A slot is free only while no document that waits has a chunk ready.

    def _open(self, name: str, tokens: Tokens, last: bool, evidence: bool) -> Document:
        if self._stopping:
            raise ShuttingDown("the service is stopping: send the document elsewhere")
        if not self.ready:
            raise NotReady("the service is warming up: try again")
        if self._find(name):
            raise ValueError(f"document {name} is open already")
        document = Document(
            name, chunk=self._grid.chunk, max_unread=self._max_unread_spans if evidence else None
        )
        document.append(0, self._checked(tokens), last)
        if document.complete and not document.fed:
            raise EmptyDocument
        seated = document.runnable and self._pool.free
        if not seated and len(self._waiting) >= self._max_waiting:
            self._observer.refused()
            raise Overloaded(f"{len(self._waiting)} documents are waiting: try again later")
        self._waiting[name] = document
        self._touch(document)
        self._observe_occupancy()
        return document

    def _touch(self, document: Document) -> None:
        """The client did something for its document, which may be runnable now."""
        document.touch(self._clock())
        if document.runnable:
            if not document.resident and self._pool.free:
                self._seat(document)
            self._wake.set()

    def _seat(self, document: Document) -> None:
        del self._waiting[document.name]
        self._resident[document.name] = document
        document.slot = self._pool.take()
        document.served = self._steps - 1
        self._observer.admitted(document.ready_for(self._clock()))
        self._wake.set()
        self._observe_occupancy()

    def _close(self, document: Document, how: Ending, error: ServiceError | None = None) -> None:
        if document.closed:
            return
        document.close(error)
        (self._resident if document.resident else self._waiting).pop(document.name)
        self._release(document)
        self._observer.closed(how, document.so_far([]))
        self._observe_occupancy()

    def _abort(self, document: Document) -> None:
        self._close(document, "aborted", UnknownDocument(f"document {document.name} was aborted"))

    def _release(self, document: Document) -> None:
        """Give a closed document's slot to the first that waits with a chunk ready.

        Under a step in flight with rows of the document it stays: the step's end calls again.
        """
        if not document.resident or document.stepping:
            return
        self._pool.give(document.slot)
        document.slot = NO_SLOT
        following = next((other for other in self._waiting.values() if other.runnable), None)
        if following and not self._stopping:
            self._seat(following)
        self._observe_occupancy()

    def _find(self, name: str) -> Document | None:
        return self._waiting.get(name) or self._resident.get(name)

    def _open_documents(self) -> list[Document]:
        return [*self._waiting.values(), *self._resident.values()]

    def _checked(self, tokens: Tokens) -> NDArray[np.int32]:
        """A copy of the ids: one that is out of range would fail all documents of its step."""
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens must be (n,) integers, not {tokens.shape} {tokens.dtype}")
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self._runner.vocab_size:
            raise ValueError(f"tokens must be ids below {self._runner.vocab_size}")
        return tokens.astype(np.int32)

    def _observe_occupancy(self) -> None:
        self._observer.occupancy(len(self._waiting), self._pool.in_use)

    def _report(self, batch: Batch, seconds: float) -> None:
        used = int(np.count_nonzero(batch.lengths))
        self._observer.stepped(used, len(batch.lengths), int(batch.lengths.sum()), seconds)

    def _rows(self, tokens: int) -> int:
        """That so many tokens of a document take."""
        return -(-tokens // self._grid.chunk)


def _spans(batch: Batch, outcome: Outcome, rows: slice) -> list[Span]:
    each = (
        batch.lengths[rows].tolist(),
        outcome.weight[rows].tolist(),
        outcome.evidence[rows].copy(),
    )
    return [Span(*shares) for shares in zip(*each, strict=True)]
