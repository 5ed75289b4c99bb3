"""What an engine tells of a document while steps read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gma.service.engine.opening import Past


class RowShares(NamedTuple):
    """What n rows in a row say: a document's logits are `Classifier.logits` of the rows' sums."""

    tokens: NDArray[np.int32]  # (n,) in each row
    weight: NDArray[np.float64]  # (n,)
    evidence: NDArray[np.float32]  # (n, labels)

    def copied(self, rows: slice) -> RowShares:
        """Copies of some rows' shares: a step's own arrays are written again."""
        return RowShares(
            self.tokens[rows].copy(), self.weight[rows].copy(), self.evidence[rows].copy()
        )

    def after(self, rows: int) -> RowShares:
        """Those behind the first `rows`."""
        return RowShares(self.tokens[rows:], self.weight[rows:], self.evidence[rows:])

    @classmethod
    def joined(cls, shares: Sequence[RowShares]) -> RowShares:
        """One after the other; at least one is needed."""
        if len(shares) == 1:
            return shares[0]
        return cls(*map(np.concatenate, zip(*shares, strict=True)))


class Kept(NamedTuple):
    """What a document was read to, in full chunks: another opening can go on from there."""

    tokens: int
    """Of this opening."""

    chunks: int
    """In which they were read."""

    past: Past


class Progress(NamedTuple):
    """A document's answer so far."""

    tokens: int
    """Read so far."""

    chunks: int
    """In which they were read."""

    logits: NDArray[np.float64]
    """(labels,), over all that was read."""

    shares: RowShares | None
    """The rows that were read since the last Progress, in order; None without evidence."""

    wait_s: float
    """The part of `queue_s` before the document's first step."""

    queue_s: float
    """Seconds in which a chunk was ready, and no step with rows of the document was running."""

    compute_s: float
    """Seconds in which one was running."""

    done: bool

    usage: NDArray[np.float64] | None = None
    """(L, H, K): how much of the document each component took, once it is done, if it was asked
    for."""

    kept: Kept | None = None
    """What was kept since the last Progress, see `Opening.keep_tokens`; of a steady document what
    was kept last, once it is done."""
