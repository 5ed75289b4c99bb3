"""How long documents are, in bytes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

Lengths = Callable[[random.Random], int]
"""Draws one length, in bytes."""

MIXED_MEDIAN, MIXED_SIGMA = 2_000, 1.0
HUGE_BYTES, HUGE_SHARE = 10_000_000, 0.01

FORMS = "fixed:BYTES, lognormal:MEDIAN_BYTES,SIGMA or mixed"


def lengths(form: str) -> Lengths:
    """Lengths as a text like `lognormal:2000,1.0` says. Raises ValueError.

    `mixed` is what a public service gets: log-normal around 2 KB, and 1% of 10 MB.
    """
    name, _, numbers = form.partition(":")
    try:
        values = [float(number) for number in numbers.split(",") if number]
    except ValueError:
        values = [math.nan]
    if all(0 < value < math.inf for value in values):
        match name, values:
            case "fixed", [size] if size >= 1:
                return lambda rng: int(size)
            case "lognormal", [median, sigma]:
                return lambda rng: lognormal(rng, median, sigma)
            case "mixed", []:
                return mixed
    raise ValueError(f"lengths are {FORMS}, not {form!r}")


def lognormal(rng: random.Random, median: float, sigma: float) -> int:
    """A length of at least one byte. `sigma` is the deviation of its natural logarithm."""
    return max(1, round(rng.lognormvariate(math.log(median), sigma)))


def mixed(rng: random.Random) -> int:
    """A length of `mixed`."""
    if rng.random() < HUGE_SHARE:
        return HUGE_BYTES
    return lognormal(rng, MIXED_MEDIAN, MIXED_SIGMA)


class Band(NamedTuple):
    """Documents that are reported together."""

    name: str
    below: float  # bytes


BANDS = (
    Band("short", 16_384),
    Band("medium", 262_144),
    Band("long", 4_194_304),
    Band("huge", math.inf),
)


def band(size: int) -> str:
    """The name of the band of a document of `size` bytes."""
    return next(each.name for each in BANDS if size < each.below)
