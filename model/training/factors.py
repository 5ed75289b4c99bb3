"""How loudly a model whose pooling is "any" speaks of each label.

Training draws rare labels more often than they are, and rates are surer of the documents that they
were trained on than of others. A factor for each label, fitted to the valid split, puts that right
and leaves sums what they are: exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gma.model.classifier import Classifier
from gma.model.scores import log_odds
from gma.model.training.corpus import Corpus
from gma.model.training.cross_entropy import cross_entropy
from gma.model.training.evaluation import read_all
from gma.model.training.least import least

APART = 0.5
"""How far labels' factors are apart, as a standard deviation of their logarithms, where documents
do not tell: few have a label that is rare."""

TOGETHER = 1.0
"""How far all are from 1 in the same way."""


def apply(classifier: Classifier, factors: list[float]) -> None:
    """Multiply each label's rates, in place, by what ``fit`` found."""
    factor = classifier.pooling.factor
    factor.data *= factor.new_tensor(factors)


def fit(classifier: Classifier, valid: Corpus) -> list[float]:
    """Find factors (labels,) that give the least cross-entropy of valid's whole documents.

    What documents do not tell stays near 1, and labels near each other.
    """
    documents = [torch.from_numpy(valid[i].astype("int32")) for i in range(len(valid))]
    found = read_all(classifier, documents)
    sums = torch.stack([x.evidence.double().sum(0) for x in found]).cpu()
    labels = torch.from_numpy(valid.labels)

    def loss(x: Tensor) -> Tensor:
        """Of the logarithm of what all share, and then of what each has beside it."""
        missed = cross_entropy(log_odds(sums * (x[0] + x[1:]).exp()), labels).sum()
        apart = (x[1:] / APART).square().sum() + (x[0] / TOGETHER).square()
        return missed + apart / 2

    x = least(loss, sums.new_zeros(1 + sums.shape[1]))
    factors: list[float] = (x[0] + x[1:]).exp().tolist()
    return factors
