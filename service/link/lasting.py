"""Documents that outlive the worker that reads them.

What a worker has read a document to is kept now and then, and the gateway holds the tokens that it
fed since. If the worker is lost, another goes on from there: whoever waits for the document notices
a pause.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from operator import add
from typing import NamedTuple

from gma.service.engine.opening import NO_TOKENS, Opening, Tokens
from gma.service.engine.progress import Kept, Progress
from gma.service.errors import (
    NoSessions,
    NotReady,
    Overloaded,
    SessionGone,
    ShuttingDown,
    UnknownDocument,
)
from gma.service.link.client import OpenDocument, WorkerClient, WorkerInfo
from gma.service.link.fed import Fed
from gma.service.observe import metrics

logger = logging.getLogger(__name__)

KEEP_TOKENS = 2**16
"""After about so many tokens what was read is kept: seconds of a CPU's time."""

LOST = (UnknownDocument, ShuttingDown)
"""What is heard of a document whose worker is gone, or going."""

MOST_LOSSES = 3
"""Workers that are lost one after the other while a document gets no further: it may be the reason,
and no other should be lost to it."""

PATIENCE_S, ASK_AGAIN_S = 120.0, 0.5
"""How long a document that lost its worker waits for another: longer than one takes to start."""


class LastingWorkers:
    """Workers whose documents go on elsewhere when one is lost: a `WorkerClient`."""

    def __init__(self, workers: WorkerClient) -> None:
        self._workers = workers

    @property
    def count(self) -> int:
        """See `WorkerClient.count`."""
        return self._workers.count

    async def open(self, opening: Opening) -> LastingDocument:
        """See `WorkerClient.open`."""
        if not (opening.last or opening.steady):
            opening = opening._replace(keep_tokens=KEEP_TOKENS)
        return LastingDocument(self._workers, opening, await self._workers.open(opening))

    async def info(self) -> WorkerInfo:
        """See `WorkerClient.info`."""
        return await self._workers.info()


class Times(NamedTuple):
    """See `Progress`."""

    wait_s: float
    queue_s: float
    compute_s: float


class LastingDocument:
    """A document, whichever worker reads it: an `OpenDocument`."""

    def __init__(self, workers: WorkerClient, opening: Opening, opened: OpenDocument) -> None:
        self._workers = workers
        self._opening = opening._replace(tokens=NO_TOKENS)  # `_fed` has them
        self._opened = opened
        self._fed = Fed(opening.tokens, opening.last)
        self._kept: Kept | None = None
        self._begin = 0, 0  # tokens and chunks before this worker's
        self._times_before = self._times = Times(0.0, 0.0, 0.0)
        self._tokens = self._rows = 0  # told, of all workers
        self._losses = 0  # since it got further
        self._there = asyncio.Event()  # a worker has all that was fed
        self._there.set()
        self._feeding = asyncio.Lock()
        self._again: asyncio.Task[None] | None = None

    async def feed(self, tokens: Tokens, last: bool) -> None:
        """See `OpenDocument.feed`. Waits while there is no worker."""
        await self._there.wait()
        async with self._feeding:
            opened = self._opened
            self._fed.add(tokens, last)
            try:
                await opened.feed(tokens, last)
            except LOST:
                if opened is self._opened:
                    self._there.clear()  # until whoever follows has found another

    async def __aiter__(self) -> AsyncIterator[Progress]:
        """See `OpenDocument.__aiter__`."""
        while True:
            rows = self._begin[1]
            try:
                async for told in self._opened:
                    progress = self._joined(told, rows)
                    rows += len(told.shares.tokens) if told.shares else 0
                    if progress.tokens > self._tokens:
                        self._losses = 0
                    if progress.tokens >= self._tokens:
                        self._tokens, self._rows = progress.tokens, max(rows, self._rows)
                        yield progress
                    if progress.done:
                        return
                return
            except LOST as error:
                await self._go_on(error)

    def close(self) -> None:
        """See `OpenDocument.close`."""
        self._opened.close()
        self._fed.forget()
        if self._again:
            self._again.cancel()

    def _joined(self, told: Progress, rows: int) -> Progress:
        """What this worker tells, after so many `rows`, behind what those before it told."""
        tokens, chunks = self._begin
        now = Times(told.wait_s, told.queue_s, told.compute_s)
        self._times = Times(*map(add, self._times_before, now))
        kept = told.kept
        if kept:
            kept = kept._replace(tokens=tokens + kept.tokens, chunks=chunks + kept.chunks)
            if not self._opening.steady:
                self._kept = kept
                self._fed.drop(kept.tokens)
        return told._replace(
            tokens=tokens + told.tokens,
            chunks=chunks + told.chunks,
            shares=told.shares and told.shares.after(max(0, self._rows - rows)),
            kept=kept,
            **self._times._asdict(),
        )

    async def _go_on(self, error: UnknownDocument | ShuttingDown) -> None:
        """Let another worker read from what was kept. Raises `error` if that can't be."""
        self._there.clear()
        self._opened.close()
        if self._again:
            self._again.cancel()
        self._losses += 1
        if not self._fed.whole or self._losses >= MOST_LOSSES:
            raise error
        logger.info("%s goes on at another worker", self._opening.name)
        metrics.DOCUMENTS_MOVED.inc()
        kept, past = self._kept, self._opening.past
        self._begin = (kept.tokens, kept.chunks) if kept else (0, 0)
        self._times_before = self._times
        tokens, last = self._fed.after(self._begin[0]) or (NO_TOKENS, False)
        opening = self._opening._replace(tokens=tokens, last=last, past=kept.past if kept else past)
        self._opened = await self._opened_again(opening)
        self._again = asyncio.create_task(
            self._feed_again(self._opened, self._begin[0] + len(tokens), last)
        )

    async def _opened_again(self, opening: Opening) -> OpenDocument:
        loop = asyncio.get_running_loop()
        until = loop.time() + PATIENCE_S
        while True:
            try:
                return await self._workers.open(opening)
            except (NotReady, Overloaded, *LOST):
                if loop.time() >= until:
                    raise
            except (NoSessions, SessionGone):
                raise UnknownDocument(
                    "the worker that was reading this document is gone, and others run another "
                    "model: send the document again"
                ) from None
            await asyncio.sleep(ASK_AGAIN_S)

    async def _feed_again(self, opened: OpenDocument, position: int, last: bool) -> None:
        """Feed what the one before was fed, from `position` on; then the rest may come."""
        try:
            async with self._feeding:
                while not last and (following := self._fed.after(position)):
                    tokens, last = following
                    await opened.feed(tokens, last)
                    position += len(tokens)
                self._there.set()
        except LOST:
            pass  # whoever follows hears it
        except Exception:
            logger.exception("%s can't be fed again", self._opening.name)
            opened.close()
