"""The places of a batch: one for as long as it is open, and more while its lines are read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from gma.service.gateway.admission import Admission, Admitted, Client
from gma.service.gateway.allowance import Key
from gma.service.observe import metrics


class Batch:
    """One request of many documents, each on a line.

    Its own place is that of a line too, so that some line can always be read; for every other at
    the same time there has to be another place. These are waited for, and half of all are for who
    sends a document by itself.
    """

    def __init__(
        self, admission: Admission, clients: Sequence[Client], key: Key | None, wait_s: float
    ) -> None:
        """`wait_s`: how long a line waits, at most, for room for its bytes."""
        self._admission = admission
        self._clients = clients
        self._key = key
        self.wait_s = wait_s
        self._lines = 0  # that have a place

    @contextmanager
    def open(self) -> Iterator[Admitted]:
        """Its own place while the context lasts: how much of it all has come. Raises ShuttingDown
        or Overloaded."""
        self._admission.check_draining()
        self._admission.check_places(self._clients)
        self._admission.change(self._clients, documents=1)
        own = Admitted(self._admission, self._clients)
        try:
            yield own
        finally:
            own.leave()

    @asynccontextmanager
    async def line(self) -> AsyncIterator[Line]:
        """A place for one more line while the context lasts, once there is one.

        Raises ShuttingDown, and AllowanceSpent.
        """
        self._admission.check_draining()
        while self._lines and not self._admission.place_for_line(self._clients):
            await self._admission.freed()
            self._admission.check_draining()
        if self._key:
            self._admission.spending.check(self._key)
        if self._lines:
            self._admission.change(self._clients, documents=1, batched=True)
        self._lines += 1
        with Line(self._admission, self._clients, self._key, self).taken() as line:
            metrics.ADMISSIONS.inc()
            yield line

    def give_back(self) -> int:
        """A line gives up its place: how many of the gateway's that frees."""
        self._lines -= 1
        return 1 if self._lines else 0


class Line(Admitted):
    """One line's place."""

    def __init__(
        self, admission: Admission, clients: Sequence[Client], key: Key | None, batch: Batch
    ) -> None:
        super().__init__(admission, clients, key)
        self._batch = batch

    def lacks_room(self, size: int) -> bool:
        """Whether it has to wait before so many more of its bytes are held. None has to that is too
        large anyhow."""
        total = self.counted_bytes + size
        if total > self._admission.max_document_bytes:
            return False
        held = self.reserved_bytes
        return not self._admission.bytes_for_line(self._clients, held, total - held)

    async def room(self, size: int) -> None:
        """Return once there is room for so many more of its bytes. Raises Overloaded if that takes
        too long."""
        try:
            async with asyncio.timeout(self._batch.wait_s):
                while self.lacks_room(size):
                    await self._admission.freed()
        except TimeoutError:
            why = f"there was no room for {size} more bytes within {self._batch.wait_s:g} s"
            raise self._admission.refusal("bytes", why) from None

    def leave(self, answer_bytes: int = 0) -> None:
        self._documents = self._batch.give_back() if self._documents else 0
        super().leave(answer_bytes)

    def _change(self, *, documents: int = 0, size: int = 0) -> None:
        self._admission.change(self._clients, documents=documents, size=size, batched=True)
