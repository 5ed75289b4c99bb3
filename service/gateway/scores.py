"""What logits say: a score for each label, and the least score at which a label is there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gma.model.config import ModelConfig

EVEN = 0.5
"""The threshold of a multi-label model's labels, unless its configuration says otherwise."""


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


def thresholds(config: ModelConfig) -> tuple[float, ...] | None:
    """The least score, label by label, at which the model says that it is there; None if it says
    the best label whatever its score."""
    if config.multi_label and config.thresholds is None:
        return (EVEN,) * len(config.labels)
    return config.thresholds
