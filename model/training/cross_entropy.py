"""The cross-entropy of documents that have one label, or any number."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def cross_entropy(
    logits: Tensor, labels: Tensor, *, smoothing: float = 0.0, rates: Tensor | None = None
) -> Tensor:
    """Return each document's cross-entropy in nats, (n,), of logits (n, labels).

    labels (n,): each document's. Or (n, labels) bool: which it has; then it is the sum of the
    labels' ``binary_cross_entropies``.
    """
    if labels.ndim == 1:
        return functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    return binary_cross_entropies(logits, labels, smoothing=smoothing, rates=rates).sum(1)


def binary_cross_entropies(
    logits: Tensor, labels: Tensor, *, smoothing: float = 0.0, rates: Tensor | None = None
) -> Tensor:
    """Return each label's binary cross-entropy in nats, of logits and labels (..., labels).

    Targets are smoothed towards ``rates`` (labels,), how many documents have each, so that who
    knows those alone has their entropy whatever the smoothing; .5 without them.
    """
    towards = logits.new_tensor(0.5) if rates is None else rates.to(logits.dtype)
    targets = labels.to(logits.dtype).lerp(towards.expand_as(logits), smoothing)
    return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
