"""How loudly each of the two parts of a score speaks: fitted on documents that neither has seen.

Both parts are surer of the documents that they were trained on than of others. Two factors, fitted
to the valid split, put that right and leave probabilities that mean something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model.classifier import Classifier
from model.corpus import Corpus
from model.ops.chunked import Rows

WINDOWS = ((256, 16), (1024, 8), (4096, 4))
"""Tokens of a window, and windows of a document: short views count as much as long ones."""

LIMIT = 100.0
"""Neither factor is larger, nor smaller than its inverse."""


def fit(classifier: Classifier, valid: Corpus) -> tuple[float, float]:
    """Factors of the deep and of the tokens' own scores with the least cross-entropy on valid.

    Documents that are all told apart would have ever larger factors, so staying at one counts as
    much as one document does. (1, 1) if nothing better is found.
    """
    parts = [torch.cat(part) for part in zip(*_parts(classifier, valid), strict=True)]
    # Copies: tensors made in inference mode can't be used where gradients are wanted.
    deep, own, labels, share = (part.clone() for part in parts)
    deep, own, share = deep.double(), own.double(), share.double()
    # Both factors are kept positive by their logarithm.
    logs = torch.zeros(2, device=deep.device, dtype=deep.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([logs], max_iter=50, line_search_fn="strong_wolfe")

    def loss(logs: Tensor) -> Tensor:
        logits = logs.exp()[0] * deep + logs.exp()[1] * own
        each = functional.cross_entropy(logits, labels, reduction="none")
        stay = 0.5 * logs.square().sum() / len(valid)
        return (each * share).sum() / share.sum() + stay

    with torch.no_grad():
        unscaled = loss(logs)
    if not unscaled.isfinite():
        return 1.0, 1.0

    def closure() -> float:
        optimizer.zero_grad()
        total = loss(logs)
        torch.autograd.backward(total)
        return total.item()

    minimize: Callable[[Callable[[], float]], object] = optimizer.step
    minimize(closure)
    with torch.no_grad():
        factors = logs.exp().clamp(1 / LIMIT, LIMIT)
        # Written so that what is NaN is no better.
        if not loss(factors.log()) < unscaled:
            return 1.0, 1.0
    fitted: list[float] = factors.tolist()
    return fitted[0], fitted[1]


@torch.inference_mode()
def _parts(
    classifier: Classifier, valid: Corpus
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The n windows of one size of one document, document after document.

    Mean deep and mean own scores (n, labels), the label (n,), the share 1 / n (n,).
    """
    device = classifier.embedding.weight.device
    pooling = classifier.pooling
    for length, most in WINDOWS:
        for index in range(len(valid)):
            document = valid[index].astype(np.int64)
            size = min(length, len(document))
            starts = np.unique(np.linspace(0, len(document) - size, most).astype(np.int64))
            tokens = torch.from_numpy(np.stack([document[s : s + size] for s in starts])).to(device)
            count = len(starts)
            hidden = _hidden(classifier, tokens)
            label = torch.full((count,), int(valid.labels[index]), device=device)
            share = torch.full((count,), 1.0 / count, device=device)
            yield pooling.deep_scores(hidden).mean(1), pooling.token(tokens).mean(1), label, share


def _hidden(classifier: Classifier, tokens: Tensor) -> Tensor:
    """Windows (n, N) of tokens, each on its own -> the last layer's output (n, N, W)."""
    count, size = tokens.shape
    which = torch.arange(count, device=tokens.device)
    rows = Rows.of(torch.full_like(which, size), which, size, classifier.dtype)
    return classifier.hidden_alone(classifier.embedding(tokens), rows)
