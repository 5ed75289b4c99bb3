"""What evidence and logits say: a score for each label."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gma.model.config import ModelConfig
from gma.service.odds import log_odds


def logits_of(
    config: ModelConfig, evidence: NDArray[np.float64], weight: float
) -> NDArray[np.float64]:
    """Logits (labels,) of a part of a document by itself, of its evidence (labels,) and weight.

    Pooling "mean" divides the one by the other; pooling "any" takes log(exp(evidence) - 1).
    """
    if config.pooling == "mean":
        return evidence / weight
    return log_odds(evidence)


def scores(logits: NDArray[np.float64], multi_label: bool) -> NDArray[np.float64]:
    """Logits, (..., labels), to scores of the same shape, each from 0 to 1.

    A multi-label model's are the sigmoids, each label by itself; others' are the softmax over all
    labels, and sum to 1.
    """
    if multi_label:
        small = np.exp(-np.abs(logits))  # never more than 1, so nothing overflows
        parts, whole = np.where(logits < 0, small, 1.0), 1 + small
    else:
        parts = np.exp(logits - logits.max(-1, keepdims=True))
        whole = parts.sum(-1, keepdims=True)
    found: NDArray[np.float64] = parts / whole
    return found
