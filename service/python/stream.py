"""A document that is classified while it is written."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from gma.model.reader import Reader
from gma.model.weights import Checkpoint
from gma.service.gateway.contract import Finding
from gma.service.python.answer import Answer
from gma.service.python.gathered import Gathered

PIECE = 64 * 1024
"""Bytes that are tokenized at once."""


class Stream:
    """One document, written piece by piece, with its answer so far at any time.

    ``with classifier.stream() as document`` ends it. Memory does not grow with what is written if
    the model is causal; a bidirectional one keeps the document's tokens, and reads all of them for
    each answer. Not for several threads at once.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, max_tokens: int | None, spans: int, components: bool
    ) -> None:
        self._reader = Reader(checkpoint, max_tokens=max_tokens, count=components)
        self._gathered = Gathered(checkpoint, spans)
        self._closed = False

    @property
    def truncated(self) -> bool:
        """Whether ``max_tokens`` cut something; what is written then is not read."""
        return self._reader.text.truncated

    def write(self, text: str | bytes) -> None:
        """Add the document's next piece: a string, or UTF-8 cut anywhere, inside a character too.

        Raises ValueError if it is not UTF-8, or if the document has ended.
        """
        if self._closed:
            raise ValueError("the document has ended: nothing can be added")
        data = text.encode() if isinstance(text, str) else text
        for start in range(0, len(data), PIECE):
            if self.truncated:
                return
            for share in self._reader.feed(data[start : start + PIECE]):
                self._gathered.add(share)

    def answer(self, *, top_k: int | None = None, evidence: bool = False) -> Answer:
        """Return what `Classifier.classify` would of all that was written so far.

        Raises ValueError if that is nothing yet.
        """
        return Answer.of(self.finding(top_k=top_k, evidence=evidence))

    def finding(self, *, top_k: int | None = None, evidence: bool = False) -> Finding:
        """Return the same as the HTTP service would answer it, but for the timing."""
        gathered = self._gathered if self._closed else self._gathered.and_(self._reader.rest())
        return gathered.finding(self._reader.text, top_k=top_k, evidence=evidence)

    def close(self) -> None:
        """End the document. Raises ValueError if its last character is unfinished."""
        if not self._closed:
            self._closed = True
            for share in self._reader.finish():
                self._gathered.add(share)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
