"""What API keys have spent of their allowances."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from gma.service.errors import AllowanceSpent
from gma.service.gateway.allowance import Key
from gma.service.observe import metrics

WINDOWS_S: Mapping[str, float] = {"documents_per_minute": 60.0, "bytes_per_day": 86400.0}
"""By limit, in how long it comes back whole."""

NEVER_S = 1e9
"""What a client that may send next to nothing is told to wait, at most."""

SLACK = 1e-6
"""Of a document, or byte: sums of fractions are not exact."""


class Spending:
    """What keys have spent of their allowances, in one of `gateways` that count alone.

    Each lets a key have its part, so that all together never let it have more than there is. What
    is spent comes back evenly, a whole allowance in its window: a key that has rested may send a
    window's worth at once.
    """

    def __init__(self, gateways: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._gateways = gateways
        self._clock = clock
        self._spent: dict[tuple[str, str], tuple[float, float]] = {}
        """By key's hash and limit: how much was spent and had not come back, and when."""

    def check(self, key: Key) -> None:
        """Raises AllowanceSpent if there is no document, or no byte, left. The last may be large:
        whether it fits is not asked, and what is too much is waited for by the next."""
        for limit, window_s in WINDOWS_S.items():
            part = self._part(key, limit)
            # A part may be less than one, and is one then.
            over = self._spent_now(key, limit) + 1 - max(part, 1)
            if part and over > SLACK:
                metrics.REFUSALS.labels("allowance").inc()
                metrics.KEY_REFUSALS.labels(key.name, limit).inc()
                most = getattr(key.allowance, limit)
                wait_s = math.ceil(min(max(1.0, over * window_s / part), NEVER_S))
                raise AllowanceSpent(f"{most:.15g} {limit}", wait_s)

    def add(self, key: Key, *, documents: int = 0, size: int = 0) -> None:
        """Note that so many documents, and bytes, of a key's were taken."""
        for limit, amount in zip(WINDOWS_S, (documents, size), strict=True):
            if amount and self._part(key, limit):
                spent = self._spent_now(key, limit) + amount
                self._spent[key.hash, limit] = spent, self._clock()

    def _part(self, key: Key, limit: str) -> float:
        """Of the key's allowance, this gateway's; 0 without a limit."""
        most: float = getattr(key.allowance, limit)
        return most / self._gateways

    def _spent_now(self, key: Key, limit: str) -> float:
        now = self._clock()
        spent, since = self._spent.get((key.hash, limit), (0.0, now))
        return max(0.0, spent - (now - since) * self._part(key, limit) / WINDOWS_S[limit])
