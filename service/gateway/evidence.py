"""Evidence: which bytes of a document speak for what, in shares that tile it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class Ruler:
    """Measures in bytes what a worker counts in tokens. It holds only the tokens not yet passed."""

    def __init__(self) -> None:
        self._ahead: deque[NDArray[np.unsignedinteger]] = deque()
        self._skipped = 0

    def skip(self, size: int) -> None:
        """The document begins with `size` bytes of no token: they count with the first."""
        self._skipped = size

    def extend(self, sizes: NDArray[np.unsignedinteger]) -> None:
        """The document goes on with tokens of so many bytes, (n,)."""
        self._ahead.append(sizes)

    def advance(self, tokens: int) -> int:
        """Pass the next `tokens` tokens, and return their bytes."""
        passed = 0
        if tokens:
            passed, self._skipped = self._skipped, 0
        while tokens:
            piece = self._ahead.popleft()
            passed += int(piece[:tokens].sum(dtype=np.int64))
            if len(piece) > tokens:
                self._ahead.appendleft(piece[tokens:])
            tokens -= min(tokens, len(piece))
        return passed


@dataclass
class Share:
    """What neighbouring rows contribute to a document's answer: sums over the rows."""

    rows: int
    tokens: int
    bytes: int
    weight: float
    evidence: NDArray[np.float64]  # (labels,)

    def add(self, other: Share) -> None:
        """Take in the share of the rows that follow."""
        self.rows += other.rows
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.weight += other.weight
        self.evidence += other.evidence


class Evidence:
    """At most `most` shares that tile a document of any length.

    All but the last hold the same number of rows, which doubles whenever there would be too many.
    Merging is exact because shares are sums.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._rows = 1
        self._shares: list[Share] = []

    @property
    def shares(self) -> Sequence[Share]:
        """In the document's order, without gaps."""
        return self._shares

    def add(self, tokens: int, size: int, weight: float, evidence: NDArray[np.float32]) -> None:
        """Add the document's next row: `size` bytes, and its `evidence`, (labels,)."""
        share = Share(1, tokens, size, weight, evidence.astype(np.float64))
        if self._shares and self._shares[-1].rows < self._rows:
            self._shares[-1].add(share)
        else:
            self._shares.append(share)
        if len(self._shares) > self._most:
            self._merge()

    def _merge(self) -> None:
        for left, right in zip(self._shares[::2], self._shares[1::2], strict=False):
            left.add(right)
        self._shares = self._shares[::2]
        self._rows *= 2
