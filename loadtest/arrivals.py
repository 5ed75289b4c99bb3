"""When documents arrive, whatever becomes of those before: seconds from the beginning.

An arrival profile is a rate that changes with time. A steady stream of points, one for each
expected document, is mapped through the inverse of the profile's integral.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

BURST_PERIOD_S, BURST_SHARE = 10.0, 0.1

Warp = Callable[[float, float, float], float]
"""When the n-th document is expected, by n, the mean or final rate, and the seconds in all."""


def _even(n: float, rate: float, seconds: float) -> float:
    return n / rate


def _bursts(n: float, rate: float, seconds: float) -> float:
    whole, part = divmod(n / (rate * BURST_PERIOD_S), 1)
    return (whole + part * BURST_SHARE) * BURST_PERIOD_S


def _ramp(n: float, rate: float, seconds: float) -> float:
    return math.sqrt(2 * n * seconds / rate)


def _regular(rng: random.Random) -> Iterator[float]:
    n = 0.0
    while True:
        yield n
        n += 1


def _random(rng: random.Random) -> Iterator[float]:
    n = 0.0
    while True:
        n += rng.expovariate(1)
        yield n


PROFILES: dict[str, tuple[Callable[[random.Random], Iterator[float]], Warp]] = {
    "poisson": (_random, _even),
    "constant": (_regular, _even),
    "bursts": (_random, _bursts),
    "ramp": (_random, _ramp),
}


def arrivals(profile: str, rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Times in ascending order, in seconds from the beginning, all before `seconds`.

    poisson: independent, `rate` a second. constant: evenly spaced. bursts: Poisson, all of each 10
    seconds' documents within their first second. ramp: Poisson, from no document to `rate` a
    second at the end. Raises ValueError for another profile, and a rate that is not above 0.
    """
    if profile not in PROFILES:
        raise ValueError(f"arrivals are {', '.join(PROFILES)}, not {profile!r}")
    if not 0 < rate < math.inf:
        raise ValueError(f"a rate is documents a second and above 0, not {rate}")
    points, warp = PROFILES[profile]
    times: list[float] = []
    for n in points(random.Random(seed)):  # noqa: S311
        due = warp(n, rate, seconds)
        if due >= seconds:
            break
        times.append(due)
    return times
