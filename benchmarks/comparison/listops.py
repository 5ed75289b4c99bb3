"""ListOps: nested operations on digits, such as `[MAX 2 9 [MIN 4 7 ] 0 ]`, and their value.

After Nangia and Bowman 2018 (arXiv:1804.06028) at the sizes of Long Range Arena: up to 10 deep and
10 wide, more than 500 and less than 2,000 tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import median

import numpy as np

from benchmarks.comparison.texts import Texts

OPERATIONS: tuple[Callable[[list[int]], int], ...] = (
    min,
    max,
    lambda values: int(median(values)),
    lambda values: sum(values) % 10,
)
OPEN, CLOSE = 10, 10 + len(OPERATIONS)
"""Digits are tokens 0 to 9; then each operation with its bracket, and the closing one."""

VOCABULARY = CLOSE + 1
LONGEST = 2048


def documents(count: int, seed: int, least: int = 500, most: int = 2000) -> Texts:
    """Make distinct documents with more than `least` and fewer than `most` tokens."""
    rng = random.Random(seed)
    found: dict[bytes, int] = {}
    while len(found) < count:
        tokens = bytearray()
        value = _write(tokens, rng, depth=1, most=most)
        if least < len(tokens) < most:
            found[bytes(tokens)] = value
    return Texts.of((np.frombuffer(each, dtype=np.uint8) for each in found), found.values())


def _write(tokens: bytearray, rng: random.Random, depth: int, most: int) -> int:
    """Write a tree, and return its value. One that is too long is not written to its end."""
    if depth >= 10 or (depth > 1 and rng.random() > 0.25) or len(tokens) > most:
        tokens.append(rng.randrange(10))
        return tokens[-1]
    operation = rng.randrange(len(OPERATIONS))
    tokens.append(OPEN + operation)
    values = [_write(tokens, rng, depth + 1, most) for _ in range(rng.randint(2, 10))]
    tokens.append(CLOSE)
    return OPERATIONS[operation](values)
