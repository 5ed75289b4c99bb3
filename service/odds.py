"""What evidence of pooling "any" says, on the host: each number by itself, wherever it lies."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEAST = 1e-30
"""Less evidence counts as this much, whose score is as good as 0."""


def log_odds(evidence: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn sums of rates >= 0, of any shape, into logits: log(exp(evidence) - 1)."""
    total = np.maximum(evidence, LEAST)
    logits: NDArray[np.float64] = total + np.log(-np.expm1(-total))
    return logits
