"""Admission: what a gateway takes at the same time, decided before anything is processed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from gma.service.errors import Overloaded, ShuttingDown, TooLarge
from gma.service.observe import metrics


class Admission:
    """Counts documents and bytes in flight, and refuses what would exceed the limits."""

    def __init__(self, *, max_documents: int, max_bytes: int, max_document_bytes: int) -> None:
        self._max_documents = max_documents
        self._max_bytes = max_bytes
        self.max_document_bytes = max_document_bytes
        self.documents = 0
        self.bytes = 0
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def admit(self, announced_bytes: int = 0) -> Iterator[Admitted]:
        """A document's place while the context lasts; so many of its bytes are known to come.

        Raises ShuttingDown, TooLarge or Overloaded.
        """
        if self.draining:
            metrics.REFUSALS.labels("draining").inc()
            raise ShuttingDown("the service is shutting down and takes no new documents: try again")
        if announced_bytes > self.max_document_bytes:
            metrics.REFUSALS.labels("size").inc()
            raise TooLarge(self.max_document_bytes)
        if self.documents >= self._max_documents:
            metrics.REFUSALS.labels("documents").inc()
            raise Overloaded(
                f"{self.documents} documents are in flight: try again when some are done"
            )
        admitted = Admitted(self)
        self._change(documents=1)
        try:
            admitted.reserve(announced_bytes)
            metrics.ADMISSIONS.inc()
            yield admitted
        finally:
            self._change(documents=-1, size=-admitted.reserved_bytes)

    async def drain(self) -> None:
        """Take nothing new, and wait until all that was taken is done."""
        self.draining = True
        await self._idle.wait()

    def reserve(self, more: int) -> None:
        """Make room for so many more bytes. Raises Overloaded."""
        if self.bytes + more > self._max_bytes:
            metrics.REFUSALS.labels("bytes").inc()
            raise Overloaded(
                f"{self.bytes} bytes of documents are in flight, and {more} more are too many: "
                "try again when some are done"
            )
        self._change(size=more)

    def _change(self, *, documents: int = 0, size: int = 0) -> None:
        self.documents += documents
        self.bytes += size
        metrics.DOCUMENTS_IN_FLIGHT.set(self.documents)
        metrics.BYTES_IN_FLIGHT.set(self.bytes)
        if self.documents:
            self._idle.clear()
        else:
            self._idle.set()


class Admitted:
    """One document's place: how much of it has come, and how much room it holds."""

    def __init__(self, admission: Admission) -> None:
        self.received_bytes = 0
        self.reserved_bytes = 0
        self._admission = admission

    def reserve(self, total_bytes: int) -> None:
        """Hold room for at least so many bytes. Raises Overloaded."""
        more = total_bytes - self.reserved_bytes
        if more > 0:
            self._admission.reserve(more)
            self.reserved_bytes = total_bytes

    def count(self, size: int) -> None:
        """So many more bytes have come. Raises TooLarge or Overloaded if they are too many."""
        self.received_bytes += size
        metrics.RECEIVED_BYTES.inc(size)
        if self.received_bytes > self._admission.max_document_bytes:
            metrics.REFUSALS.labels("size").inc()
            raise TooLarge(self._admission.max_document_bytes)
        self.reserve(self.received_bytes)
