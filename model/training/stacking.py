"""How loudly a score's two parts speak, and how much text it takes to be sure.

Both parts are surer of the documents that they were trained on than of others, and a mean of few
scores is as loud as one of many. Two factors and a prior, fitted to the valid split, put that right
and leave probabilities that mean something, whatever the length. Where documents have any number of
labels, each label has an offset too: training draws the rare ones more often than they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gma.model.classifier import Classifier
from gma.model.ops.chunked import Rows
from gma.model.training.corpus import Corpus
from gma.model.training.cross_entropy import cross_entropy
from gma.model.training.least import least

WINDOWS = ((64, 16), (256, 16), (1024, 8), (4096, 4), (16384, 2))
"""Tokens of a window, and a document's windows at most: short views count as much as long ones."""

LIMIT = 100.0
"""Neither factor is larger, nor smaller than its inverse."""

MOST = 1 << 20
"""Scores of each part that three numbers are fitted to: windows by labels."""

MOST_OF_OFFSETS = 1 << 22
"""The same where each label has an offset too."""

MOST_TOKENS = 1 << 20
"""Of windows that are read on the CPU, where they would take longer than the training between."""

PRIORS = (0.0, *(2.0**i for i in range(1, 14)))
"""Tokens of score 0 that may be the prior."""


class Stacking(NamedTuple):
    """What is fitted to the valid split."""

    deep: float = 1.0  # multiplies the deep scores
    token: float = 1.0  # multiplies the tokens' own scores
    prior_tokens: float = 0.0  # see ModelConfig
    offsets: tuple[float, ...] | None = None  # (labels,): added to every token's scores


def apply(classifier: Classifier, stacking: Stacking) -> None:
    """Fold a stacking into the classifier, which had no prior."""
    classifier.pooling.scale_(stacking.deep, stacking.token, stacking.offsets)
    prior = {"prior_tokens": stacking.prior_tokens}
    classifier.config = classifier.config.model_copy(update=prior)


def fit(classifier: Classifier, valid: Corpus) -> Stacking:
    """Find what gives the least cross-entropy on valid; ``Stacking()`` if nothing is better.

    Where labels, documents or tokens are very many, every so many-th document is looked at.
    """
    windows = [torch.cat(part) for part in zip(*_parts(classifier, valid), strict=True)]
    # Copies: tensors made in inference mode can't be used where gradients are wanted.
    deep, own, weight, labels, share = (part.clone() for part in windows)
    deep, own, weight, share = deep.double(), own.double(), weight.double(), share.double()

    def measured(factors: Tensor, offsets: Tensor, prior: float) -> Tensor:
        scores = factors[0] * deep + factors[1] * own + offsets * weight[:, None]
        each = cross_entropy(scores / (weight + prior)[:, None], labels)
        return (each * share).sum() / share.sum()

    # Documents that are all told apart would have ever larger factors, and of one length as large a
    # prior, so staying at one counts as much as one document does.
    stay = 0.5 / len(valid)

    def offsets_in(x: Tensor) -> Tensor:
        return x[2:] if valid.multi_label else x.new_zeros(1)

    def loss(x: Tensor, prior: float) -> Tensor:
        return measured(x[:2].exp(), offsets_in(x), prior) + stay * x.square().sum()

    # Logarithms of the factors, then the offsets: none where only differences of labels count.
    start = deep.new_zeros(2 + (deep.shape[1] if valid.multi_label else 0))
    best, lowest = Stacking(), float(measured(deep.new_ones(2), offsets_in(start), 0.0))
    for prior in PRIORS if math.isfinite(lowest) else ():
        x = least(partial(loss, prior=prior), start)
        factors, offsets = x[:2].exp().clamp(1 / LIMIT, LIMIT), offsets_in(x)
        found = float(measured(factors, offsets, prior) + stay * x.square().sum())
        if found < lowest:  # which what is NaN is not
            fitted = tuple(offsets.tolist()) if valid.multi_label else None
            best, lowest = Stacking(factors[0].item(), factors[1].item(), prior, fitted), found
    return best


@torch.inference_mode()
def _parts(
    classifier: Classifier, valid: Corpus
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Yield the n windows of one size of one document, document after document.

    A window is sums of deep and of own scores (n, labels); its tokens, share and label: (n,), or
    labels (n, labels). A document's windows of one size share 1, and what is the whole document
    counts once for every size that it fits in.
    """
    device = classifier.embedding.weight.device
    pooling = classifier.pooling
    for index in range(0, len(valid), _every(classifier, valid)):
        document = valid[index].astype(np.int64)
        for number, (length, most) in enumerate(WINDOWS):
            size, count = _cut(len(document), length, most)
            starts = np.linspace(0, len(document) - size, count).astype(np.int64)
            tokens = torch.from_numpy(np.stack([document[s : s + size] for s in starts])).to(device)
            whole = size == len(document)
            deep = pooling.scores_of(pooling.gated(_hidden(classifier, tokens)).sum(1))
            weight = torch.full((count,), float(size), device=device)
            label = torch.from_numpy(valid.labels[index : index + 1].repeat(count, 0)).to(device)
            sizes = len(WINDOWS) - number if whole else 1
            share = torch.full((count,), sizes / count, device=device)
            own = functional.embedding_bag(tokens, pooling.token.weight, mode="sum")
            yield deep, own, weight, label, share
            if whole:
                break


def _cut(document: int, length: int, most: int) -> tuple[int, int]:
    """Return how many tokens a window has, and how many windows the document: enough to cover it,
    if these are not more than ``most``."""
    size = min(length, document)
    return size, min(most, -(-document // size))


def _every(classifier: Classifier, valid: Corpus) -> int:
    """Say each how many-th document is looked at."""
    lengths = np.diff(valid.ends, prepend=0)
    cuts = [_cut(int(n), *window) for n in lengths for window in WINDOWS]
    scores = sum(count for _, count in cuts) * len(classifier.config.labels)
    tokens = 0 if classifier.embedding.weight.is_cuda else sum(size * n for size, n in cuts)
    most = MOST_OF_OFFSETS if valid.multi_label else MOST
    return max(1, -(-scores // most), -(-tokens // MOST_TOKENS))


def _hidden(classifier: Classifier, tokens: Tensor) -> Tensor:
    """Take windows (n, N) of tokens, each on its own, to the last layer's output (n, N, W)."""
    count, size = tokens.shape
    which = torch.arange(count, device=tokens.device)
    rows = Rows.of(torch.full_like(which, size), which, size, classifier.dtype)
    return classifier.hidden_alone(classifier.embedding(tokens), rows)
