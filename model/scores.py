"""From logits to scores, and from scores to the labels that the model says are there."""

from __future__ import annotations

import torch
from torch import Tensor

from gma.model.config import ModelConfig

LEAST = 1e-30
"""Less evidence of pooling "any" counts as this much, whose score is as good as 0."""


def log_odds(evidence: Tensor) -> Tensor:
    """Turn evidence of pooling "any", sums of rates >= 0, into logits, float64 of any shape.

    Rates are those at which a label's passages are found: by noisy-or, sums S of them find at least
    one with probability 1 - exp(-S), whose logit is log(exp(S) - 1).
    """
    total = evidence.double().clamp_min(LEAST)
    return total + torch.log(-torch.expm1(-total))


def scores(config: ModelConfig, logits: Tensor) -> Tensor:
    """Turn logits (..., labels) into scores in [0, 1], of the same shape and dtype.

    They are the labels' shares of 1 (softmax), or each by itself (sigmoid) if the model is
    multi-label.
    """
    return logits.sigmoid() if config.multi_label else logits.softmax(-1)


def labels_of(config: ModelConfig, scores: Tensor) -> Tensor:
    """Say which labels are there: scores (..., labels) -> bool (..., labels).

    Of a multi-label model these are all whose score reaches their threshold.
    Of another it is the best label, the first of equals; none if that has a threshold and does not
    reach it.
    """
    there = torch.ones_like(scores, dtype=torch.bool)
    if config.least_scores is not None:
        there = scores >= scores.new_tensor(config.least_scores)
    if config.multi_label:
        return there
    best = torch.zeros_like(there).scatter(-1, scores.argmax(-1, keepdim=True), value=True)
    return best & there
