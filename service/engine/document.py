"""A document as the engine knows it: what came of it, what was read, and what that said."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gma.service.engine.scheduler import chunks_ready
from gma.service.errors import ServiceError, WrongOffset

NO_SLOT = -1


@dataclass(frozen=True)
class Span:
    """One row's share of a document: its logits are `Classifier.logits` of its spans' sums."""

    tokens: int
    weight: float
    evidence: NDArray[np.float32]  # (labels,)


@dataclass(frozen=True)
class Progress:
    """A document's answer so far."""

    tokens: int  # read so far
    chunks: int  # so far
    logits: NDArray[np.float64]  # (labels,), over all that was read
    spans: list[Span]  # read since the last Progress, in order; empty if evidence is not kept
    wait_s: float  # the part of queue_s before its first step
    queue_s: float  # so far: a chunk was ready, and no step with rows of the document was running
    compute_s: float  # so far: one was running
    done: bool


class Document:
    """One open document. All of it belongs to the event loop's thread.

    Its client feeds the inbox and consumes progress; the engine's loop takes chunks and adds what
    steps say. It is `waiting`, then has a slot, then is closed: done, failed or aborted.
    """

    def __init__(self, name: str, *, chunk: int, max_unread: int | None) -> None:
        """`max_unread`: spans that may lie unread before the document is held; None: keep none."""
        self.name = name
        self.slot = NO_SLOT
        self.fresh = True  # no step with rows of it was launched: what is in its slot is another's
        self.served = 0
        self.stepping = 0  # rows of it in the steps in flight
        self.closed = False
        self.error: ServiceError | None = None
        self.touched_at = 0.0  # when its client or a step last did something for it

        self.fed = 0
        self.waiting = 0
        self.complete = False

        self.read = 0
        self.chunks = 0
        self.wait_s = 0.0
        self.queue_s = 0.0
        self.compute_s = 0.0

        self._chunk = chunk
        self._max_unread = max_unread
        self._inbox: deque[NDArray[np.int32]] = deque()
        self._ready_at: float | None = None
        self._logits: NDArray[np.float64] = np.zeros(0)
        self._spans: list[Span] = []
        self._news = asyncio.Event()
        self._urgent = asyncio.Event()  # news that no reader should leave for later
        self._room = asyncio.Event()

    @property
    def flush(self) -> bool:
        """A partial chunk may run: no token that is still to come belongs into it."""
        return self.complete

    @property
    def resident(self) -> bool:
        return self.slot != NO_SLOT

    @property
    def done(self) -> bool:
        return self.complete and self.read == self.fed

    @property
    def runnable(self) -> bool:
        """A chunk is ready, and what was read before has been consumed far enough."""
        # What is in flight will lie unread too.
        unread = len(self._spans) + self.stepping
        held = self._max_unread is not None and unread >= self._max_unread
        return not (self.closed or held) and chunks_ready(self, self._chunk) > 0

    # The client's side.

    def append(self, offset: int, tokens: NDArray[np.int32], last: bool) -> None:
        """Put tokens into the inbox. They must begin where those before ended."""
        if offset != self.fed:
            raise WrongOffset(self.fed, offset)
        if self.complete and len(tokens):
            raise ValueError(
                f"document {self.name} is complete: nothing can follow its last tokens"
            )
        if len(tokens):
            self._inbox.append(tokens)
        self.fed += len(tokens)
        self.waiting += len(tokens)
        self.complete = self.complete or last

    async def room(self, inbox_tokens: int) -> None:
        """Wait until no more than `inbox_tokens` are waiting; raises what closed the document."""
        while self.waiting > inbox_tokens and not self.closed:
            self._room.clear()
            await self._room.wait()
        if self.error:
            raise self.error

    async def progress(self, pause_s: float | None = 0.0) -> Progress:
        """Wait for something new, and consume it; raises what closed the document.

        Nothing that happens within `pause_s` wakes the waiting reader, unless it is urgent: with
        many documents in every step, that would cost more than the step's own work. None: only
        what is urgent does.
        """
        if pause_s is None:
            await self._urgent.wait()
        elif pause_s:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._urgent.wait()
        await self._news.wait()
        self._news.clear()
        self._urgent.clear()
        if self.error:
            raise self.error
        spans, self._spans = self._spans, []
        return self.so_far(spans)

    def so_far(self, spans: list[Span]) -> Progress:
        """The answer so far, with these spans."""
        return Progress(
            self.read,
            self.chunks,
            self._logits,
            spans,
            self.wait_s,
            self.queue_s,
            self.compute_s,
            self.done,
        )

    # The engine's side.

    def touch(self, now: float) -> None:
        """The client or a step did something: it is not idle; a chunk may be ready from now on."""
        self.touched_at = now
        if self._ready_at is None and not self.stepping and self.runnable:
            self._ready_at = now

    def ready_for(self, now: float) -> float:
        """Seconds that a chunk had been ready, and in no running step, by `now`."""
        return 0.0 if self._ready_at is None else now - self._ready_at

    def begin_step(self, step: int) -> None:
        """The step with this number, about to be launched, is to have rows of it."""
        self.served = step
        self.fresh = False

    def take(self, row: NDArray[np.int32]) -> int:
        """Move the next tokens from the inbox into a step's `row`, (C,); how many there were."""
        taken = 0
        while taken < len(row) and self._inbox:
            piece = self._inbox.popleft()
            now = piece[: len(row) - taken]
            row[taken : taken + len(now)] = now
            taken += len(now)
            if len(now) < len(piece):
                self._inbox.appendleft(piece[len(now) :])
        self.waiting -= taken
        self.stepping += 1
        self._room.set()
        return taken

    def end_step(self, rows: int, began: float, now: float) -> None:
        """A step with so many rows of it ran from `began` until now."""
        self.queue_s += self.ready_for(began)
        if not self.compute_s:
            self.wait_s = self.queue_s
        self._ready_at = None
        self.compute_s += now - began
        self.stepping -= rows
        self.touch(now)

    def add(self, tokens: int, chunks: int, logits: NDArray[np.float64]) -> None:
        """So many were read in a step, and (labels,) logits of all that was read."""
        self.read += tokens
        self.chunks += chunks
        self._logits = logits
        self._news.set()

    @property
    def keeps_spans(self) -> bool:
        """Its client wants them."""
        return self._max_unread is not None

    def keep(self, spans: list[Span]) -> None:
        """What the step said of it, one span a row."""
        self._spans += spans
        if self._max_unread and 2 * len(self._spans) >= self._max_unread:
            self._urgent.set()  # before the document is held for them

    def close(self, error: ServiceError | None) -> None:
        """The last thing that happens: wakes whoever waits for the document."""
        self.closed = True
        self.error = error
        self._inbox.clear()
        self._news.set()
        self._urgent.set()
        self._room.set()
