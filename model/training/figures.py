"""Figures of how good answers are.

Shapes: D documents, L labels. Answers and truth are bool (D, L): which labels a document is said to
have, and has.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.bool_]
Scores = NDArray[np.float64]

BINS = 10
"""Of scores, in the calibration error: equally wide."""


def one_hot(labels: NDArray[np.int64], count: int) -> Labels:
    """Say as bool (D, L) which one of ``count`` labels each of the documents (D,) has."""
    hot: Labels = labels[:, None] == np.arange(count)
    return hot


def accuracy(said: Labels, actual: Labels) -> float:
    """Return the share of documents of which no label is wrong."""
    return float((said == actual).all(1).mean())


def f1(said: Labels, actual: Labels) -> NDArray[np.float64]:
    """Return each label's F1, (L,); NaN for a label that is neither said nor there."""
    hits, either = (said & actual).sum(0), said.sum(0) + actual.sum(0)
    return np.where(either > 0, 2 * hits / np.maximum(either, 1), np.nan)


def macro_f1(said: Labels, actual: Labels) -> float:
    """Return the mean F1 of the labels that are said or there; 0 if there are none."""
    each = f1(said, actual)
    return float(np.nanmean(each)) if not np.isnan(each).all() else 0.0


def micro_f1(said: Labels, actual: Labels) -> float:
    """Return the F1 of all pairs of a document and a label; 0 if none is said or there."""
    return float(np.nan_to_num(f1(said.reshape(-1, 1), actual.reshape(-1, 1)))[0])


def average_precision(scores: NDArray[np.float64], actual: Labels) -> float:
    """Return the area under precision by recall of scores (n,), truth (n,), in steps.

    Equal scores are one step. NaN if nothing is there.
    """
    if not actual.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    hits = actual[order].cumsum()
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of equal scores
    gained = np.diff(hits[last], prepend=0)
    return float((gained * hits[last] / (last + 1)).sum() / hits[-1])


def average_precisions(scores: Scores, actual: Labels) -> NDArray[np.float64]:
    """Return the average precision of each label, (L,), of scores (D, L)."""
    return np.array([average_precision(s, a) for s, a in zip(scores.T, actual.T, strict=True)])


def calibration_error(scores: Scores, actual: Labels) -> float:
    """Return how far scores (D, L) are from how often their label is there, on average.

    Each pair of a document and a label counts alike, in bins of like scores.
    """
    which = np.minimum(scores.ravel() * BINS, BINS - 1).astype(np.int64)
    over = np.bincount(which, scores.ravel() - actual.ravel(), minlength=BINS)
    return float(np.abs(over).sum() / scores.size)
