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


DocumentT = TypeVar("DocumentT", bound=Backlog)


def chunks_ready(document: Backlog, chunk: int) -> int:
    """How many rows the document can fill now.

    A partial chunk counts only at the document's end, so where a document is cut depends on its
    length alone, not on how its text happened to arrive.
    """
    return -(-document.queued // chunk) if document.complete else document.queued // chunk


def schedule(documents: Iterable[DocumentT], rows: int, chunk: int) -> list[tuple[DocumentT, int]]:
    """The next step: pairs of a document and how many of its tokens go.

    Every document with a chunk ready gets one row before any gets a second. With more documents
    than rows, those served longest ago come first (ties in the order given, which is oldest first),
    so N documents each have their turn within ceil(N / rows) steps, and none starves. Rows that are
    left go to those that are best read at once and fit, the shortest first; then each to the
    document that has the most tokens without one. None is left empty while a chunk is ready. The
    caller cuts a document's tokens into rows in order, all full but perhaps the last.
    """
    ready = [document for document in documents if chunks_ready(document, chunk)]
    chosen = sorted(ready, key=lambda document: document.served)[:rows]
    granted = [1] * len(chosen)
    left = rows - len(chosen)
    at_once = [(d.queued, i) for i, d in enumerate(chosen) if d.at_once]
    for _, i in sorted(at_once):
        others = chunks_ready(chosen[i], chunk) - 1
        if others > left:
            break
        granted[i] += others
        left -= others
    more = [
        (chunk - d.queued, i) for i, d in enumerate(chosen) if granted[i] < chunks_ready(d, chunk)
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
