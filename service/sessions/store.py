"""Where sessions are kept, for any gateway to find."""

from __future__ import annotations

import hashlib
from typing import NamedTuple, Protocol


class Stored(NamedTuple):
    """What a store holds under a name."""

    data: bytes
    expires_at: float
    """Seconds since 1970."""

    @property
    def version(self) -> str:
        """Another for any other data."""
        return version_of(self.data)


def version_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Store(Protocol):
    """Keeps bytes by name, which is 64 hexadecimal digits. What was written is there for any
    process that uses the same store, and outlives them all. Callable from several threads.

    What has expired can still be read for as long again as it was to live: so its client learns
    why. Every method raises StoreFailed, and what writes StoreFull; nothing was changed then.
    """

    def secret(self) -> bytes:
        """32 random bytes, always the same."""

    def create(self, name: str, stored: Stored) -> None:
        """Keep what is new."""

    def read(self, name: str) -> Stored | None:
        """What is kept; None if nothing is."""

    def replace(self, name: str, version: str, stored: Stored) -> bool:
        """Keep this in place of what has this version. Returns whether that was there: of several
        who replace the same, one does."""

    def delete(self, name: str) -> None:
        """Keep it no longer, if it was there."""

    def sweep(self, now: float) -> None:
        """Remove what expired too long ago, where the store does not do so by itself."""
