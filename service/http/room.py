"""How many connections a process has, below what it may open."""

from __future__ import annotations

import logging
import resource
from typing import Protocol

logger = logging.getLogger(__name__)

MOST_CONNECTIONS = 1024
"""Each may hold a request's head, of 32 KB, of somebody who has shown no key."""


class Held(Protocol):
    """A connection, as its room sees it."""

    def abort(self) -> None: ...


class Room:
    """Takes connections up to a bound, and beyond it each for the one that rests longest.

    A connection rests while no request of it is being read or answered: before the first head is
    complete, and between requests. Those who open many and say nothing so shut out each other.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: set[Held] = set()
        self._resting: dict[Held, None] = {}  # who rests longest is first
        self._told = False

    def enter(self, connection: Held) -> bool:
        """Take it, resting. False if there is no room and nobody rests: whoever calls closes it."""
        self._held.add(connection)
        full = len(self._held) > self._most
        if full and not self._told:
            self._told = True
            logger.warning(
                "more than %d connections: those that rest longest are closed", self._most
            )
        if full and not self._resting:
            return False
        if full:
            longest = next(iter(self._resting))
            del self._resting[longest]
            longest.abort()
        self._resting[connection] = None
        return True

    def work(self, connection: Held) -> None:
        """A request of it has begun."""
        self._resting.pop(connection, None)

    def rest(self, connection: Held) -> None:
        """It has nothing to do."""
        self._resting[connection] = None

    def leave(self, connection: Held) -> None:
        """It is closed."""
        self._held.discard(connection)
        self._resting.pop(connection, None)


def most_connections() -> int:
    """As many as this process may have: half of the files that it may open, the rest being needed
    for workers, logs and metrics, and at most MOST_CONNECTIONS."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if files < 0 else min(MOST_CONNECTIONS, files // 2)
