"""An open document: what its client does with it, and what the engine keeps of it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gma.service.engine.observer import Ending
from gma.service.engine.opening import Opening, Past, Tokens
from gma.service.engine.places import NO_SLOT
from gma.service.engine.progress import Kept, Progress, RowShares
from gma.service.engine.scheduler import chunks_ready
from gma.service.engine.snapshot import Snapshot, encoded
from gma.service.errors import Empty, ServiceError, TooLong, UnknownDocument


class Terms(NamedTuple):
    """What holds for every document of an engine."""

    vocab_size: int
    chunk: int
    """Tokens of a row."""

    passes: int
    """How often a document is read over: if more than once, it is kept whole."""

    inbox_tokens: int
    """Tokens that a document may have queued before `feed` waits, or all that one kept whole may
    have."""

    max_unread_rows: int
    """Rows of evidence that may lie unread before their document is held."""

    interval_s: float
    """Least time between two Progress of one document."""

    model: str
    """Fingerprint of what reads it."""

    keeps: bool
    """States can be taken out of their slots."""


Before: TypeAlias = Callable[[], Snapshot]
"""Waits for a document's state, in the thread that computes."""


class Heard(NamedTuple):
    """A step that ended, as one of its documents hears of it."""

    rows: slice
    """The document's own of the step's rows."""

    began: float
    now: float
    passes: range
    """In which the step read them."""


class Owner(Protocol):
    """The engine, as its documents see it."""

    def changed(self, document: Document) -> None:
        """Its client did something: there may be a chunk ready now, or nothing left to do."""

    def close(self, document: Document, how: Ending, error: ServiceError) -> None:
        """The document's client wants no more of it, or can't have it read."""


class Document:
    """One open document, the handle that `Engine.open` gives.

    Its client feeds it, iterates over its progress and closes it. Its engine gives it a slot, takes
    its tokens into steps, and tells it what those say. It waits for a slot, then has one, which it
    may lose to another while it has no chunk ready; then it is closed: done, failed or aborted. All
    of it belongs to the event loop's thread.
    """

    def __init__(
        self,
        opening: Opening,
        owner: Owner,
        terms: Terms,
        now: float,
        before: Before | None = None,
    ) -> None:
        """`before`: the state of the opening's past, if it has one. Raises Empty or TooLong, and
        ValueError for what are no tokens."""
        self.name = opening.name
        self.slot = NO_SLOT
        self.pages: list[int] = []
        self.pass_number = 0
        self.fresh = before is None
        """No step of its pass was launched: its slot shows another's past."""
        self.before = before
        """What is to be put into its slot before its next step, if that does not lie there."""
        self.steady = opening.steady
        self._keep_tokens = opening.keep_tokens if terms.keeps else 0
        self.served = 0
        self.stepping = 0  # rows of it in the steps in flight
        self.closed = False
        self.touched_at = 0.0  # when its client or a step last did something for it

        self.fed = 0
        self.queued = 0  # of what was fed, in no step of its pass
        self.complete = False
        self._certain = 0  # of what was fed, what did not come with the last feed
        self._kept: tuple[int, int, Snapshot, NDArray[np.float64] | None] | None = None

        self._owner = owner
        self._terms = terms
        self._evidence = opening.evidence
        self.components = opening.components
        self._pause_s = terms.interval_s if opening.running else None
        self._error: ServiceError | None = None
        self._inbox: deque[Tokens] = deque()
        self._heard = 0  # tokens of all passes together
        self._ready_at: float | None = None
        self._chunks = 0
        self._wait_s = self._queue_s = self._compute_s = 0.0
        self._logits: NDArray[np.float64] = np.zeros(0)
        self._usage = opening.past.usage if opening.past else None
        self._shares: list[RowShares] = []
        self._unread_rows = 0
        self._news = asyncio.Event()
        self._urgent = asyncio.Event()  # news that its client should not leave for later
        self._room = asyncio.Event()
        self._append(opening.tokens, opening.last)
        if self.complete and not self.fed:
            raise Empty
        self.touch(now)

    # Its client's side.

    async def feed(self, tokens: Tokens, last: bool) -> None:
        """Add tokens, (n,) ids. They are taken at once; then the call lasts while too many wait.

        Raises what closed the document, TooLong, which closes it, and ValueError for what are no
        tokens or follow the last.
        """
        if self._error:
            raise self._error
        try:
            self._append(tokens, last)
        except TooLong as error:
            self._owner.close(self, "failed", error)
            raise
        self._owner.changed(self)
        while self.queued > self._terms.inbox_tokens and not self.closed:
            self._room.clear()
            await self._room.wait()
        if self._error:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[Progress]:
        """Tell how far it is read, the last time with `done`. Raises what closed the document.

        The first Progress comes with the first step; between two of them there is the interval, or
        less where much evidence waits. Without `Opening.running` there are none between the first
        and the last but where it does. A slow client loses nothing: what it did not take is in the
        next Progress, and beyond a bound of evidence that it did not take nothing more is read.
        """
        pause_s: float | None = 0.0
        while True:
            await self._until_news(pause_s)
            if self._error:
                raise self._error
            progress = self._progress()
            pause_s = self._pause_s
            if not self.closed:
                self._owner.changed(self)
            yield progress
            if progress.done:
                return

    def close(self) -> None:
        """Read it no further. Nothing happens if it is closed already."""
        self._owner.close(self, "aborted", UnknownDocument(f"{self.name} was aborted"))

    async def _until_news(self, pause_s: float | None) -> None:
        """Nothing that happens within `pause_s` wakes who waits, unless it is urgent: with many
        documents in every step that would cost more than the step's own work. None: only what is
        urgent does."""
        if pause_s is None:
            await self._urgent.wait()
        elif pause_s:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._urgent.wait()
        await self._news.wait()
        if not self.closed:  # or whoever asks once more would wait for ever
            self._news.clear()
            self._urgent.clear()

    def _progress(self) -> Progress:
        shares = RowShares.joined(self._shares) if self._shares else None
        self._shares, self._unread_rows = [], 0
        return Progress(
            self.read,
            self._chunks,
            self._logits,
            shares,
            self._wait_s,
            self._queue_s,
            self._compute_s,
            self.done,
            self._usage if self.done else None,
            self._take_kept() if self.steady == self.done else None,
        )

    def _take_kept(self) -> Kept | None:
        if self._kept is None:
            return None
        (tokens, chunks, snapshot, usage), self._kept = self._kept, None
        return Kept(tokens, chunks, Past(self._terms.model, encoded(snapshot), usage))

    def _append(self, tokens: Tokens, last: bool) -> None:
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens must be (n,) integers, not {tokens.shape} {tokens.dtype}")
        if self.complete and len(tokens):
            raise ValueError(f"{self.name} is complete: nothing can follow its last tokens")
        if len(tokens):
            # One id out of range would fail all documents of its step.
            if not 0 <= tokens.min() <= tokens.max() < self._terms.vocab_size:
                raise ValueError(f"tokens must be ids below {self._terms.vocab_size}")
            if self._whole and self.fed + len(tokens) > self._terms.inbox_tokens:
                raise TooLong(self._terms.inbox_tokens)
            self._inbox.append(tokens.astype(np.int32))
        self.fed += len(tokens)
        self.queued += len(tokens)
        self._certain += 0 if last else len(tokens)
        self.complete = self.complete or last

    # Its engine's side.

    @property
    def resident(self) -> bool:
        return self.slot != NO_SLOT

    @property
    def needs(self) -> int:
        """Pages that it lies in, by what was fed."""
        return -(-self.fed // self._terms.chunk) if self._whole else 0

    @property
    def read(self) -> int:
        """Tokens that were read; of one kept whole, what all passes so far amount to."""
        return self._heard // self._terms.passes

    @property
    def left(self) -> int:
        """Tokens in no step yet; of one kept whole, what all passes that are left amount to."""
        taken = self.pass_number * self.fed + self.fed - self.queued
        return self.fed - taken // self._terms.passes

    @property
    def done(self) -> bool:
        return self.complete and self.read == self.fed

    @property
    def at_once(self) -> bool:
        """One step with all of it reads it to its end: see `last_pass`."""
        return self._whole and self.fresh

    @property
    def _whole(self) -> bool:
        return self._terms.passes > 1

    @property
    def _last_pass(self) -> int:
        return self._terms.passes - 1

    @property
    def runnable(self) -> bool:
        """A chunk is ready, and what was read before has been taken by its client far enough."""
        # What is in flight will lie unread too.
        unread = self._unread_rows + self.stepping
        held = self._evidence and unread >= self._terms.max_unread_rows
        if self.closed or held or (self._whole and not self.complete):
            return False
        return chunks_ready(self, self._terms.chunk) > 0

    def touch(self, now: float) -> None:
        """Its client or a step did something: it is not idle; a chunk may be ready from now on."""
        self.touched_at = now
        if self._ready_at is None and not self.stepping and self.runnable:
            self._ready_at = now

    def ready_for(self, now: float) -> float:
        """Seconds that a chunk had been ready, and in no running step, by `now`."""
        return 0.0 if self._ready_at is None else now - self._ready_at

    def next_pages(self, rows: int) -> list[int]:
        """The pages of its next rows; none if it is not kept whole."""
        first = (self.fed - self.queued) // self._terms.chunk
        return self.pages[first : first + rows]

    def last_pass(self, tokens: int) -> int:
        """The last pass in which a step with its next `tokens` reads them: one step is enough for
        all passes that are left if those are all tokens that it has."""
        return self._last_pass if tokens == self.fed else self.pass_number

    def keeps(self, tokens: int) -> bool:
        """Whether what it is read to is kept after a step with its next `tokens`."""
        every, before = self._keep_tokens, self.fed - self.queued
        after = before + tokens
        due = every > 0 and after // every > before // every
        # A steady one is read from its begin again, whatever was kept of it. Of any other something
        # has to be left, or whoever goes on from there has nothing to read, and so no answer.
        most = self._certain if self.steady else self._certain - 1
        return due and tokens % self._terms.chunk == 0 and after <= most

    def keep(self, snapshot: Snapshot) -> None:
        """Note the state after the step that it heard of last."""
        usage = None if self._usage is None else self._usage.copy()
        self._kept = self.read, self._chunks, snapshot, usage
        if not self.steady:
            self._urgent.set()  # until its client has it, more would have to be read again

    def take(self, rows: Tokens, tokens: int, step: int) -> None:
        """Move its next `tokens` into `rows`, (r, C), of the step with this number."""
        row, taken = rows.reshape(-1), 0
        self.pass_number = self.last_pass(tokens)
        again = self.pass_number < self._last_pass
        while taken < tokens:
            piece = self._inbox.popleft()
            now = piece[: tokens - taken]
            row[taken : taken + len(now)] = now
            taken += len(now)
            if len(now) < len(piece):
                self._inbox.appendleft(piece[len(now) :])
            if again:
                self._inbox.append(now)  # behind all others: for the next pass
        self.queued -= tokens
        self.stepping += len(rows)
        self.served = step
        self.before = None
        self.fresh = again and not self.queued
        if self.fresh:
            self.pass_number += 1
            self.queued = self.fed
        self._room.set()

    def hear(self, step: Heard, logits: NDArray[np.float64], shares: RowShares) -> bool:
        """Note that a step ended, and what it said: `logits`, (labels,), of all that was read, and
        among the step's `shares` those of its own rows. Returns whether that was its end."""
        rows = step.rows
        self._heard += int(shares.tokens[rows].sum()) * len(step.passes)
        if self._last_pass in step.passes:
            self._chunks += rows.stop - rows.start
            self._logits = logits.copy()
            if self._evidence:
                self._shares.append(shares.copied(rows))
                self._unread_rows += rows.stop - rows.start
                if 2 * self._unread_rows >= self._terms.max_unread_rows:
                    self._urgent.set()  # before the document is held for them
        self._news.set()
        self.end_step(step)
        if self.done:
            self.end()
        return self.done

    def count(self, usage: NDArray[np.float32]) -> None:
        """Add its own rows' usage of components, (r, L, H, K), of a step that it hears of next."""
        added = usage.sum(0, dtype=np.float64)
        self._usage = added if self._usage is None else self._usage + added

    def end_step(self, step: Heard) -> None:
        """Note that a step ended."""
        self._queue_s += self.ready_for(step.began)
        if not self._compute_s:
            self._wait_s = self._queue_s
        self._ready_at = None
        self._compute_s += step.now - step.began
        self.stepping -= step.rows.stop - step.rows.start
        self.touch(step.now)

    def end(self, error: ServiceError | None = None) -> None:
        """The last thing that happens: wakes whoever waits for the document."""
        self.closed = True
        self._error = error
        self._inbox.clear()
        for event in (self._news, self._urgent, self._room):
            event.set()
