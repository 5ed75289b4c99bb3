"""How often, and when, what has failed is tried again."""

from __future__ import annotations

import asyncio
import random
import time

from gma.service.client.error import ConnectionLost, ServiceError

AGAIN = {429, 502, 503}
"""Statuses that say that nothing is wrong with the request; 502 comes of proxies."""

PAUSE_S = 0.5
"""Before the second attempt, and twice as long before each after, unless the service tells."""

MOST_PAUSE_S = 60.0
"""What is told to come again later than that is not waited for."""


class Attempts:
    """The attempts at one thing."""

    def __init__(self, retries: int, deadline_s: float | None = None) -> None:
        """`deadline_s` from now on: an attempt that would begin later is not made."""
        self.made = 0
        """Those that failed, and were followed by another."""
        self._left = retries
        self._ends = None if deadline_s is None else time.monotonic() + deadline_s

    @property
    def left_s(self) -> float | None:
        """Until the deadline, if there is one."""
        return None if self._ends is None else self._ends - time.monotonic()

    async def again(self, error: ServiceError | ConnectionLost, *, also: bool = False) -> None:
        """Wait until it is time for another attempt; raises the error if there is to be none.

        `also`: another attempt may help, whatever the status says.
        """
        pause_s = self._pause_s(error, also)
        late = self.left_s is not None and pause_s is not None and pause_s >= self.left_s
        if pause_s is None or late or not self._left:
            raise error
        self._left -= 1
        self.made += 1
        await asyncio.sleep(pause_s)

    def _pause_s(self, error: ServiceError | ConnectionLost, also: bool) -> float | None:
        usual: float = min(MOST_PAUSE_S, PAUSE_S * 2**self.made)
        # Drawn, for clients that were refused together should not come together again.
        drawn = random.uniform(0, usual)  # noqa: S311
        if isinstance(error, ConnectionLost):
            return usual / 2 + drawn / 2
        if error.status not in AGAIN and not also:
            return None
        if error.retry_after_s is None:
            return usual / 2 + drawn / 2
        return None if error.retry_after_s > MOST_PAUSE_S else error.retry_after_s + drawn
