"""Where documents lie on a worker: slots, and pages of those that are read whole. Pure policy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

NO_SLOT = -1

SHORT_SHARE = 128
"""A document is short if it needs no more than this part of all pages."""

SHORTS = 16
"""Of the longest short documents, so many have pages of their own, which no other gets."""


class Guest(Protocol):
    """What has to be known of a document."""

    slot: int
    pages: list[int]

    @property
    def needs(self) -> int:
        """Pages that it lies in; 0 if it is read as it comes."""


GuestT = TypeVar("GuestT", bound=Guest)


class Places:
    """The slots and pages of a runner that are free.

    A document takes its slot and all its pages at once, and keeps them to its end. Short documents
    and others have pages of their own, so neither wait for those of the other; among themselves
    nobody passes one that came before, however many pages that waits for.
    """

    def __init__(self, slots: int, pages: int) -> None:
        self._count = slots, pages
        self._slots = list(range(slots))[::-1]
        self._short = pages // SHORT_SHARE
        kept = SHORTS * self._short
        self._pages = list(range(kept, pages))
        self._short_pages = list(range(kept))
        self.longest = len(self._pages)
        """Pages that a document can have."""

    @property
    def in_use(self) -> tuple[int, int]:
        """Slots and pages that documents have."""
        pages = len(self._pages) + len(self._short_pages)
        return self._count[0] - len(self._slots), self._count[1] - pages

    def admit(self, waiting: Iterable[GuestT]) -> Iterator[GuestT]:
        """Give places to those that wait, in their order, and yield who got one."""
        held = set()
        for guest in waiting:
            if not self._slots:
                return
            pages, short = self._pages_for(guest)
            if short in held or len(pages) < guest.needs:
                held.add(short)
                continue
            guest.slot = self._slots.pop()
            kept = len(pages) - guest.needs
            guest.pages = pages[kept:]
            del pages[kept:]
            yield guest

    def leave(self, guest: Guest) -> None:
        """Take a document's place back."""
        pages, _ = self._pages_for(guest)
        pages.extend(guest.pages)
        self._slots.append(guest.slot)
        guest.slot, guest.pages = NO_SLOT, []

    def _pages_for(self, guest: Guest) -> tuple[list[int], bool]:
        """The pages that are free for such a document, and whether it is short."""
        short = guest.needs <= self._short
        return (self._short_pages if short else self._pages), short
