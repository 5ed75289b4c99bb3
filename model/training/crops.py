"""Random crops of labelled documents: what a training step reads."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gma.model.training.corpus import Corpus


class Crops:
    """Random crops of random documents, on the device."""

    def __init__(
        self,
        train: Corpus,
        start_fraction: float,
        device: torch.device,
        *,
        balance: float = 1.0,
        label_weights: Mapping[int, float] | None = None,
    ) -> None:
        """Crop the documents of ``train``.

        ``start_fraction``: share of the crops that begin where their document begins. ``balance``:
        at 1 each label is drawn as often as any other, at 0 each document; between them a label of
        n documents is drawn in proportion to n ** (1 - balance). ``label_weights``: by label, how
        many times as often it is drawn as that says; 1 if it has none.

        Of documents with lists of labels, a label is drawn and then one of those that have it; to
        have none counts as a label.
        """
        self.start_fraction = start_fraction
        self.tokens = torch.from_numpy(train.tokens.astype(np.int32)).to(device)
        self.starts = np.concatenate([[0], train.ends[:-1]])
        self.ends = train.ends
        self.labels = train.labels
        groups = _by_label(train.labels)
        self.by_label = [documents for _, documents in groups]
        factors = [(label_weights or {}).get(label, 1.0) for label, _ in groups]
        counts = np.array([len(documents) for documents in self.by_label])
        shares = counts ** (1 - balance) * factors
        self.shares = shares / shares.sum()  # (labels in train,): how often each is drawn
        self.longest = int((self.ends - self.starts).max())
        """Tokens of the longest document: no crop needs to be longer."""

    def draw(
        self, rng: np.random.Generator, rows: int, length: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw ``rows`` crops: tokens (B, N) int64, lengths (B,), labels (B,) or (B, labels) bool.

        A crop of a document that is shorter than ``length`` is the whole of it; what follows it
        in its row is nobody's.
        """
        documents = np.array([rng.choice(self.by_label[i]) for i in self._labels(rng, rows)])
        sizes = self.ends[documents] - self.starts[documents]
        at = rng.integers(0, np.maximum(sizes - length, 0) + 1)
        at[rng.random(rows) < self.start_fraction] = 0
        lengths = torch.from_numpy(np.minimum(sizes, length))
        first = torch.from_numpy(self.starts[documents] + at)
        device = self.tokens.device
        index = first.to(device)[:, None] + torch.arange(length, device=device)
        tokens = self.tokens[index.clamp_(max=len(self.tokens) - 1)].long()
        return tokens, lengths.to(device), torch.from_numpy(self.labels[documents]).to(device)

    def _labels(self, rng: np.random.Generator, rows: int) -> NDArray[np.int64]:
        """Draw labels, each as often as its share says, or one more or less: (rows,)."""
        # Equally far apart over the shares, laid end to end: none has a row too many by chance.
        order = rng.permutation(len(self.shares))
        at = (rng.random() + np.arange(rows)) / rows
        drawn = np.searchsorted(self.shares[order].cumsum(), at, side="right")
        return rng.permutation(order[np.minimum(drawn, len(order) - 1)])

    @property
    def rates(self) -> NDArray[np.float64] | None:
        """How many of the crops have each label, (labels,), if they have lists of labels."""
        if self.labels.ndim == 1:
            return None
        of_groups = np.stack([self.labels[documents].mean(0) for documents in self.by_label])
        rates: NDArray[np.float64] = self.shares @ of_groups
        return rates

    @property
    def guess(self) -> float:
        """The label's loss, in nats, of who knows only how often labels are drawn."""
        if (rates := self.rates) is None:
            return float(-(self.shares * np.log(self.shares)).sum())
        each = np.stack([rates, 1 - rates]).clip(1e-12)
        return float(-(each * np.log(each)).sum())


def _by_label(labels: NDArray[np.int64] | NDArray[np.bool_]) -> list[tuple[int, NDArray[np.int64]]]:
    """Group documents by label, -1 being that of those without any; no group is empty."""
    if labels.ndim == 1:
        present, counts = np.unique(labels, return_counts=True)
        order = np.argsort(labels, kind="stable")
        groups = np.split(order, counts.cumsum()[:-1])
        return [(int(label), group) for label, group in zip(present, groups, strict=True)]
    found = [(i, np.flatnonzero(labels[:, i])) for i in range(labels.shape[1])]
    found.append((-1, np.flatnonzero(~labels.any(1))))
    return [(label, group) for label, group in found if len(group)]
