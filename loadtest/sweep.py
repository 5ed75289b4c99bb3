"""The highest rate that a service keeps its SLOs at."""

from __future__ import annotations

from collections.abc import Callable

MOST_STEPS = 16


def highest(meets: Callable[[float], bool], start: float, precision: float = 1.1) -> float | None:
    """The highest rate found that meets, from `start` up or down.

    Doubles or halves until one rate meets and one does not, then halves the ratio between them
    until it is at most `precision`. None if no rate met in 16 trials; if all did, the last of them,
    which is then a lower bound.
    """
    low = high = None
    rate = start
    for _ in range(MOST_STEPS):
        if meets(rate):
            low = rate
        else:
            high = rate
        if low is None:
            rate /= 2
        elif high is None:
            rate *= 2
        elif high / low <= precision:
            break
        else:
            rate = (low * high) ** 0.5
    return low
