"""Admission: what a gateway takes at the same time, decided before anything is processed."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Self

from gma.service.errors import (
    Overloaded,
    ServiceError,
    ShuttingDown,
    TooLarge,
    TooLate,
    retry_after,
)
from gma.service.gateway.allowance import Key
from gma.service.gateway.spending import Spending
from gma.service.observe import metrics
from gma.service.settings import Settings

NEWS = 0.1
"""What the last document weighs in how long documents take."""

LONG_TOKENS = 2**16
"""Of a document that says how fast documents are read."""

TOKEN_BYTES = 8
"""No text has longer tokens than that on average, but for one of runs of a character."""

UNREAD = (429, 503)
"""Statuses of documents that were not read, for no fault of their clients."""

BATCH_SHARE = 0.5
"""Of the places and bytes: what lines of batches may hold, so that others find some."""

GRACE_S = 0.25
"""How long a body may come slowly before it makes way for others, if all places are taken."""


class Client(NamedTuple):
    """Whose document it is, by one of the ways to tell: its key, or its address."""

    kind: str
    name: str
    share: float
    """Of the places, and of the bytes, that it may hold if it holds more than one document."""


class Admission:
    """Counts documents and bytes in flight, and refuses what would exceed the limits."""

    def __init__(self, settings: Settings, spending: Spending | None = None) -> None:
        self.spending = spending or Spending()
        self._max_documents = settings.max_documents_in_flight
        self._max_bytes = settings.max_bytes_in_flight
        self._max_slow = settings.max_slow_uploads
        self.max_document_bytes = settings.max_document_bytes
        self.documents = 0
        self.bytes = 0
        self.received_bytes = 0
        """Of all documents since the start."""
        self._takes_s = 0.0  # a document, from its admission to its answer, of late
        self._fastest = 0.0  # tokens a second at which a document was read
        self.drains = asyncio.Event()
        """Set once nothing new is taken."""
        self._freed = asyncio.Event()
        self._batched_documents = self._batched_bytes = 0
        self._documents_of: Counter[Client] = Counter()
        self._bytes_of: Counter[Client] = Counter()
        self._min_rate = settings.min_upload_rate
        self._sending: dict[Admitted, Callable[[], None]] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def admit(
        self,
        announced_bytes: int = 0,
        clients: Sequence[Client] = (),
        deadline_s: float | None = None,
        key: Key | None = None,
    ) -> Iterator[Admitted]:
        """A place for a document of `clients` while the context lasts; so many of its bytes are
        known to come, it is of no use after so long, and `key`'s allowance is spent on it.

        Raises ShuttingDown, TooLarge, TooLate, AllowanceSpent or Overloaded.
        """
        self.check_draining()
        if announced_bytes > self.max_document_bytes:
            metrics.REFUSALS.labels("size").inc()
            raise TooLarge(self.max_document_bytes)
        if deadline_s is not None:
            self._check_deadline(announced_bytes, deadline_s)
        if key:
            self.spending.check(key)
        self.check_places(clients)
        self.change(clients, documents=1)
        with Admitted(self, clients, key).taken() as admitted:
            admitted.reserve(announced_bytes)
            metrics.ADMISSIONS.inc()
            yield admitted

    def check_draining(self) -> None:
        """Raises ShuttingDown if nothing new is taken."""
        if self.draining:
            metrics.REFUSALS.labels("draining").inc()
            raise ShuttingDown("the service is shutting down and takes no new documents: try again")

    def check_places(self, clients: Sequence[Client]) -> None:
        """Raises Overloaded if there is no place for a document of `clients`."""
        if self.documents >= self._max_documents and not self._make_way():
            raise self.refusal("documents", f"{self.documents} documents are in flight")
        for client in clients:
            found = self._documents_of[client]
            if found and found >= client.share * self._max_documents:
                raise self.refusal(
                    client.kind, f"{found} documents of this {client.kind} are in flight"
                )

    def room(self, clients: Sequence[Client]) -> int:
        """How many more documents of `clients` there are places for."""
        free = [self._max_documents - self.documents]
        free += [
            math.ceil(client.share * self._max_documents) - self._documents_of[client]
            for client in clients
        ]
        return max(0, min(free))

    def place_for_line(self, clients: Sequence[Client]) -> bool:
        """Whether a line of a batch may have another place than the batch's own."""
        few = self._batched_documents < BATCH_SHARE * self._max_documents
        light = self._batched_bytes < BATCH_SHARE * self._max_bytes
        return few and light and self.room(clients) > 0

    def bytes_for_line(self, clients: Sequence[Client], held: int, more: int) -> bool:
        """Whether a line that holds so many bytes may hold more of them."""
        alone = self._batched_bytes == held
        light = alone or self._batched_bytes + more <= BATCH_SHARE * self._max_bytes
        return light and self._lacking(clients, more) is None

    async def freed(self) -> None:
        """Return when some place, or some bytes, are given back, or the service shuts down."""
        self._freed.clear()
        await self._freed.wait()

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken."""
        return self.drains.is_set()

    async def drain(self) -> None:
        """Take nothing new, and wait until all that was taken is done."""
        self.drains.set()
        self._freed.set()
        await self._idle.wait()

    def reserve(self, clients: Sequence[Client], more: int) -> None:
        """See that there is room for so many more bytes of a document of `clients`. Raises
        Overloaded."""
        if lacking := self._lacking(clients, more):
            raise self.refusal(*lacking)

    def change(
        self,
        clients: Sequence[Client],
        *,
        documents: int = 0,
        size: int = 0,
        batched: bool = False,
    ) -> None:
        """Count what comes, and what goes; `batched`: of a batch's line."""
        self.documents += documents
        self.bytes += size
        if batched:
            self._batched_documents += documents
            self._batched_bytes += size
        for client in clients:
            self._documents_of[client] += documents
            self._bytes_of[client] += size
            if not (self._documents_of[client] or self._bytes_of[client]):
                del self._documents_of[client], self._bytes_of[client]
        metrics.DOCUMENTS_IN_FLIGHT.set(self.documents)
        metrics.BYTES_IN_FLIGHT.set(self.bytes)
        if documents < 0 or size < 0:
            self._freed.set()
        if self.documents:
            self._idle.clear()
        else:
            self._idle.set()

    def _lacking(self, clients: Sequence[Client], more: int) -> tuple[str, str] | None:
        """What there is too little of for so many more bytes, and why."""
        if self.bytes + more > self._max_bytes:
            return "bytes", f"{self.bytes} bytes are in flight, and {more} more are too many"
        for client in clients:
            found = self._bytes_of[client] + more
            if self._documents_of[client] > 1 and found > client.share * self._max_bytes:
                return client.kind, f"{found} bytes of this {client.kind} would be in flight"
        return None

    def _check_deadline(self, size: int, seconds: float) -> None:
        """Raises TooLate if a document of that size would have to be read faster than any was.

        Without one that was read it is let pass: it will be the one for the next.
        """
        fastest = self._fastest * TOKEN_BYTES
        if fastest and size > fastest * seconds:
            metrics.REFUSALS.labels("deadline").inc()
            raise TooLate(
                f"{size} bytes would take longer than the {1000 * seconds:.0f} ms of x-deadline-ms:"
                f" {fastest:.0f} a second can be read at most. Allow more time"
            )

    def read(self, tokens: int, seconds: float) -> None:
        """Note that so many tokens of a document were read in so long, without the time in which
        they came. Little ones say nothing of speed."""
        if tokens >= LONG_TOKENS:
            self._fastest = max(self._fastest, tokens / max(seconds, 1e-6))

    def answered(self, seconds: float) -> None:
        """Note how long a document took."""
        self._takes_s += (NEWS if self._takes_s else 1.0) * (seconds - self._takes_s)

    def refusal(self, reason: str, why: str) -> Overloaded:
        """The error to raise for what there is too little of. It says by when others will have been
        answered."""
        metrics.REFUSALS.labels(reason).inc()
        return Overloaded(f"{why}: try again when some are done", retry_after(self._takes_s))

    def sends(self, admitted: Admitted, give_up: Callable[[], None]) -> None:
        """Note that a document's body begins to come; `give_up` ends that."""
        self._sending[admitted] = give_up

    def sent(self, admitted: Admitted) -> None:
        """Note that no more of it comes."""
        self._sending.pop(admitted, None)

    def bound_slow(self) -> None:
        """Give up a body that comes slowly if too many do."""
        slow = [each for each in self._sending if each.slow]
        if len(slow) > self._max_slow:
            self._give_up(slow)

    def _make_way(self) -> bool:
        """Give up a body that comes slowly for a document that may not."""
        now = time.monotonic()
        slow = []
        for each in self._sending:
            age, came = now - each.awaited_since, each.received_bytes - each.received_before
            if each.slow or (age > GRACE_S and came < self._min_rate * age):
                slow.append(each)
        if slow:
            self._give_up(slow)
        return bool(slow)

    def _give_up(self, slow: list[Admitted]) -> None:
        """Give up that of which least has come."""
        least = min(slow, key=lambda each: each.received_bytes)
        metrics.REFUSALS.labels("slow").inc()
        self._sending[least]()
        least.leave()


class Admitted:
    """One document's place: how much of it has come, and how much room it holds."""

    def __init__(
        self, admission: Admission, clients: Sequence[Client], key: Key | None = None
    ) -> None:
        """Of a document that is counted already."""
        self.began = time.monotonic()
        self.texts = 1
        self.received_bytes = 0
        self.counted_bytes = 0
        """Those that have come, or what they unpacked to, if that is more."""
        self.reserved_bytes = 0
        self.slow = False
        self.awaited_since = self.began
        """When it was last begun to wait for its body, of which `received_before` had come."""
        self.received_before = 0
        self._admission = admission
        self._clients = clients
        self._key = key
        self._documents = 1

    @contextmanager
    def taken(self) -> Iterator[Self]:
        """Spend the key's allowance on it, unless it is not read; leave in the end."""
        spending = self._admission.spending
        if self._key:
            spending.add(self._key, documents=1)
        try:
            yield self
        except ServiceError as error:
            if self._key and error.status in UNREAD:
                spending.add(self._key, documents=-self.texts, size=-self.counted_bytes)
            raise
        finally:
            self.leave()

    def reserve(self, total_bytes: int) -> None:
        """Hold room for at least so many bytes. Raises Overloaded."""
        more = total_bytes - self.reserved_bytes
        if more > 0:
            self._admission.reserve(self._clients, more)
            self._change(size=more)
            self.reserved_bytes = total_bytes

    def widen(self, more: int) -> int:
        """So many more documents came with it: spend the key's allowance on them, which the next
        waits for if they are too many, and hold places for those for which there are some. Returns
        how many may be read at once."""
        self.texts += more
        if self._key:
            self._admission.spending.add(self._key, documents=more)
        places = min(more, self._admission.room(self._clients)) if self._documents else 0
        self._change(documents=places)
        self._documents += places
        return 1 + places

    def receive(self, size: int) -> None:
        """So many more bytes have come, of what may be any number of documents."""
        self.received_bytes += size
        self._admission.received_bytes += size
        metrics.RECEIVED_BYTES.inc(size)

    def count(self, size: int) -> None:
        """So many more bytes have come. Raises TooLarge or Overloaded if they are too many."""
        self.receive(size)
        self.hold(self.received_bytes)

    def hold(self, total_bytes: int) -> None:
        """It has so many bytes in all. Raises TooLarge or Overloaded if they are too many."""
        more = total_bytes - self.counted_bytes
        if more <= 0:
            return
        self.counted_bytes = total_bytes
        if self._key:
            self._admission.spending.add(self._key, size=more)
        if total_bytes > self._admission.max_document_bytes:
            metrics.REFUSALS.labels("size").inc()
            raise TooLarge(self._admission.max_document_bytes)
        try:
            self.reserve(total_bytes)
        except Overloaded:
            self.leave()  # now, or all who come at the same time would be refused
            raise

    def sends(self, give_up: Callable[[], None]) -> None:
        """Its body is waited for. `give_up` is called if it comes too slowly for others."""
        self.slow = False
        self.awaited_since = time.monotonic()
        self.received_before = self.received_bytes
        self._admission.sends(self, give_up)

    def comes(self, *, slowly: bool) -> None:
        """How fast it comes now."""
        self.slow = slowly
        if slowly:
            self._admission.bound_slow()

    def sent(self) -> None:
        """No more of it is waited for."""
        self._admission.sent(self)

    def leave(self, answer_bytes: int = 0) -> None:
        """Give the place back, and hold room for an answer alone, until that is sent."""
        self.sent()
        if answer_bytes:
            self._admission.answered(time.monotonic() - self.began)
        self._change(documents=-self._documents, size=answer_bytes - self.reserved_bytes)
        self._documents, self.reserved_bytes = 0, answer_bytes

    def _change(self, *, documents: int = 0, size: int = 0) -> None:
        self._admission.change(self._clients, documents=documents, size=size)
