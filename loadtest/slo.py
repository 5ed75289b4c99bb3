"""What latency is asked for: `p99<=1s` of all documents, `short:p99<=1s` of one band's."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple, Self

from gma.loadtest.client import Outcome
from gma.loadtest.lengths import BANDS, band

_FORM = re.compile(r"(?:(\w+):)?p(\d+(?:\.\d+)?)<=(\d+(?:\.\d+)?)s?")


class Slo(NamedTuple):
    """At least a share of the documents is answered within so many seconds."""

    band: str | None  # None: all
    share: float
    limit_s: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an SLO as it is written. Raises ValueError."""
        found = _FORM.fullmatch(text.replace(" ", ""))
        names = [each.name for each in BANDS]
        if not found or found[1] not in [None, *names] or not 0 < float(found[2]) < 100:
            raise ValueError(
                f"an SLO is like p99<=1s or short:p99<=1s ({', '.join(names)}), not {text!r}"
            )
        return cls(found[1], float(found[2]) / 100, float(found[3]))

    def __str__(self) -> str:
        of = "" if self.band is None else f"{self.band}:"
        return f"{of}p{self.share * 100:g}<={self.limit_s:g}s"

    def concerns(self, outcome: Outcome) -> bool:
        """Whether it is about this document."""
        return self.band in (None, band(outcome.bytes))

    def kept_by(self, outcome: Outcome) -> bool:
        """Whether it was answered in time, or answered at all if the SLO is not about it."""
        in_time = outcome.seconds <= self.limit_s or not self.concerns(outcome)
        return outcome.error is None and in_time

    def value(self, outcomes: Sequence[Outcome]) -> float | None:
        """The quantile in seconds, where an error took for ever; None without documents."""
        return quantile(
            [
                math.inf if outcome.error else outcome.seconds
                for outcome in outcomes
                if self.concerns(outcome)
            ],
            self.share,
        )

    def met(self, outcomes: Sequence[Outcome]) -> bool:
        """Whether it holds; without any document nothing shows that it does."""
        value = self.value(outcomes)
        return value is not None and value <= self.limit_s


def quantile(values: Sequence[float], q: float) -> float | None:
    """The least value that a share `q` of them does not exceed: one of them, never in between.

    So with fewer than 1 / (1 - q) values it is the largest.
    """
    if not values:
        return None
    # As a product 0.99 * 100 is a little more than 99.
    return sorted(values)[max(0, math.ceil(round(q * len(values), 9)) - 1)]
