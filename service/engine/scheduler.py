"""Which documents have rows in the next step. Pure policy: no tensors, no clock, no waiting."""

from collections.abc import Iterable
from heapq import heapify, heappop, heapreplace
from typing import Protocol, TypeVar


class Backlog(Protocol):
    """What the policy has to know of a document."""

    @property
    def queued(self) -> int:
        """Tokens that have arrived and have not been in a step."""

    @property
    def complete(self) -> bool:
        """Nothing more is to come: what is left over from full chunks may run."""

    @property
    def served(self) -> int:
        """The number of the last step that had a row of the document.

        For a new one, that of the step before the latest: it goes before those that the latest
        served, and behind those that it passed over.
        """

    @property
    def at_once(self) -> bool:
        """One step with all that it has queued saves it later ones."""

    @property
    def steady(self) -> bool:
        """It has at most one row in a step."""


DocumentT = TypeVar("DocumentT", bound=Backlog)


def chunks_ready(document: Backlog, chunk: int) -> int:
    """How many rows the document can fill now.

    A partial chunk counts only at the document's end, so where a document is cut depends on its
    length alone, not on how its text happened to arrive.
    """
    return -(-document.queued // chunk) if document.complete else document.queued // chunk


def schedule(documents: Iterable[DocumentT], rows: int, chunk: int) -> list[tuple[DocumentT, int]]:
    """The next step: pairs of a document and how many of its tokens go.

    Those served longest ago come first (ties in the order given, which is oldest first). One that
    is best read at once, and fits into a step, gets all its rows or waits for a step in which it
    does; any other gets one. Each row left goes to the document that then has the most tokens
    without one. So N documents of which none is read at once each have their turn within
    ceil(N / rows) steps, and none starves: one that was passed over is among the first of the next
    step. A steady one never gets a second row. The caller cuts a document's tokens into rows in
    order, all full but perhaps the last.
    """
    ready = [document for document in documents if chunks_ready(document, chunk)]
    chosen, granted, left = [], [], rows
    for document in sorted(ready, key=lambda document: document.served):
        chunks = chunks_ready(document, chunk)
        own = chunks if document.at_once and chunks <= rows else 1
        if own <= left:
            chosen.append(document)
            granted.append(own)
            left -= own
    more = [
        (chunk - d.queued, i)
        for i, d in enumerate(chosen)
        if granted[i] < chunks_ready(d, chunk) and not d.steady
    ]
    heapify(more)
    while left and more:
        most, i = more[0]
        granted[i] += 1
        left -= 1
        if granted[i] < chunks_ready(chosen[i], chunk):
            heapreplace(more, (most + chunk, i))
        else:
            heappop(more)
    return [(d, min(own * chunk, d.queued)) for d, own in zip(chosen, granted, strict=True)]
