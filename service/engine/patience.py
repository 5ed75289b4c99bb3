"""How long an engine waits for a document's client."""

from __future__ import annotations

from collections.abc import Iterable

from gma.service.engine.document import Document


class Patience:
    """Finds the documents whose client did nothing for too long while the engine waited for it."""

    def __init__(self, timeout_s: float, now: float) -> None:
        self.timeout_s = timeout_s
        self.ends_at = now
        """Before this nobody stalls, so there is no need to look."""

    def stalled(self, documents: Iterable[Document], now: float) -> list[Document]:
        """The documents, of all that are open, that stall now."""
        # Whoever is waited for only later cannot stall before this either.
        self.ends_at = now + self.timeout_s
        found = []
        for document in documents:
            if document.runnable or document.stepping:
                continue
            stalls_at = document.touched_at + self.timeout_s
            if stalls_at > now:
                self.ends_at = min(self.ends_at, stalls_at)
            else:
                found.append(document)
        return found
