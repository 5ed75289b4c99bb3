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
    so N documents each have their turn within ceil(N / rows) steps, and none starves. Each row left
    goes to the document that then has the most tokens without one; none is left empty while a chunk
    is ready. The caller cuts a document's tokens into rows in order, all full but perhaps the last.
    """
    ready = [document for document in documents if chunks_ready(document, chunk)]
    chosen = sorted(ready, key=lambda document: document.served)[:rows]
    granted = [chunk] * len(chosen)
    more = [(chunk - d.queued, i) for i, d in enumerate(chosen) if chunks_ready(d, chunk) > 1]
    heapify(more)
    for _ in range(rows - len(chosen)):
        if not more:
            break
        left, i = more[0]
        granted[i] += chunk
        if granted[i] // chunk < chunks_ready(chosen[i], chunk):
            heapreplace(more, (left + chunk, i))
        else:
            heappop(more)
    return [(d, min(tokens, d.queued)) for d, tokens in zip(chosen, granted, strict=True)]
