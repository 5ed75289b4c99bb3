"""From which scores a label is there, fitted to documents that were not trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gma.model.config import EVEN
from gma.model.training.figures import Labels, Scores

ENOUGH = 10
"""Documents that a label needs for a threshold of its own; with fewer it has that of all."""

Thresholds = tuple[float, ...]


def best_f1(scores: Scores, actual: Labels) -> Thresholds:
    """Choose thresholds of scores (D, L) by each label's F1, actual (D, L).

    A label that fewer than ``ENOUGH`` documents have gets the threshold that is best for all pairs
    of a document and a label. Of equally good ones the nearest to .5.
    """
    shared = _best(scores.ravel(), actual.ravel())
    return tuple(
        _best(of_label, there) if there.sum() >= ENOUGH else shared
        for of_label, there in zip(scores.T, actual.T, strict=True)
    )


def keeping(scores: Scores, actual: Labels, lost: float) -> Thresholds:
    """Choose thresholds below which the share ``lost`` of each label's right answers falls.

    scores (D, L), of which the best is the answer; actual (D, L). A label of fewer than ``ENOUGH``
    right answers gets the threshold that all right answers together would have.
    """
    best = scores.argmax(1)
    right = np.take_along_axis(actual, best[:, None], 1)[:, 0]
    sure = scores.max(1)
    shared = _quantile(sure[right], lost)
    of_labels = [sure[right & (best == label)] for label in range(scores.shape[1])]
    return tuple(_quantile(x, lost) if len(x) >= ENOUGH else shared for x in of_labels)


def _quantile(scores: NDArray[np.float64], share: float) -> float:
    """Find the score that this share of the scores is less than."""
    return float(np.quantile(scores, share, method="lower")) if len(scores) else 0.0


def _best(scores: NDArray[np.float64], actual: Labels) -> float:
    """Find the threshold of scores (n,) with the best F1: between two of them, or .5."""
    if not actual.any():
        return EVEN
    order = np.argsort(-scores, kind="stable")
    ranked = np.append(scores[order], 0.0)
    hits = actual[order].cumsum()
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + hits[-1])
    above, below = ranked[:-1], ranked[1:]
    between = np.where((below < EVEN) & (above >= EVEN), EVEN, (above + below) / 2)
    f1[(above == below) & (np.arange(len(f1)) < len(f1) - 1)] = -1.0  # nothing is between equals
    best = between[f1 == f1.max()]
    return float(best[np.abs(best - EVEN).argmin()])
