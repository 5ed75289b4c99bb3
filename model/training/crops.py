"""Random crops of labelled documents: what a training step reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gma.model.training.corpus import NO_SPANS, Corpus


class Drawn(NamedTuple):
    """B crops of up to N tokens, of documents with up to M spans."""

    tokens: Tensor  # (B, N) int64; what follows a crop in its row is nobody's
    lengths: Tensor  # (B,)
    labels: Tensor  # (B,), or (B, labels) bool: the document's
    spans: Tensor
    """(B, M, 3) int64: label, first token and the first after it, of all spans of the document;
    tokens are counted from the crop's first, and label is -1 where there is no span."""

    def trimmed(self, multiple: int) -> Iterator[tuple[NDArray[np.int64], Self]]:
        """Yield rows of like length and their crops, no wider than they need to be.

        A width is a multiple of ``multiple``, and every row is in one of the parts.
        """
        widths = -(-self.lengths.cpu().numpy() // multiple) * multiple
        for width in np.unique(widths):
            rows = np.flatnonzero(widths == width)
            at = torch.from_numpy(rows).to(self.tokens.device)
            tokens = self.tokens[at, :width]
            yield rows, type(self)(tokens, self.lengths[at], self.labels[at], self.spans[at])


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
        spans: bool = False,
    ) -> None:
        """Crop the documents of ``train``.

        ``start_fraction``: share of the crops that begin where their document begins. ``balance``:
        at 1 each label is drawn as often as any other, at 0 each document; between them a label of
        n documents is drawn in proportion to n ** (1 - balance). ``label_weights``: by label, how
        many times as often it is drawn as that says; 1 if it has none.

        Of documents with lists of labels, a label is drawn and then one of those that have it; to
        have none counts as a label. ``spans``: tell where documents' spans are.
        """
        self.start_fraction = start_fraction
        self.tokens = torch.from_numpy(train.tokens.astype(np.int32)).to(device)
        self.starts = np.concatenate([[0], train.ends[:-1]])
        self.ends = train.ends
        self.labels = train.labels
        groups = _by_label(train.labels)
        factors = [(label_weights or {}).get(label, 1.0) for label, _ in groups]
        counts = np.array([len(documents) for _, documents in groups])
        self._grouped = np.concatenate([documents for _, documents in groups])
        self._counts, self._firsts = counts, counts.cumsum() - counts
        shares = counts ** (1 - balance) * factors
        self.shares = shares / shares.sum()  # (labels in train,): how often each is drawn
        self.longest = int((self.ends - self.starts).max())
        """Tokens of the longest document: no crop needs to be longer."""
        found = train.spans if spans else NO_SPANS
        self._spans = np.column_stack([found.label, found.tokens])
        self._spans_end = np.bincount(found.document, minlength=len(train)).cumsum()
        self._most_spans = int(np.diff(self._spans_end, prepend=0).max())

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Drawn:
        """Draw ``rows`` crops of ``length`` tokens.

        A crop of a document that is shorter is the whole of it.
        """
        groups = self._labels(rng, rows)
        which = (rng.random(rows) * self._counts[groups]).astype(np.int64)
        documents = self._grouped[self._firsts[groups] + which]
        sizes = self.ends[documents] - self.starts[documents]
        at = rng.integers(0, np.maximum(sizes - length, 0) + 1)
        at[rng.random(rows) < self.start_fraction] = 0
        lengths = torch.from_numpy(np.minimum(sizes, length))
        first = torch.from_numpy(self.starts[documents] + at)
        device = self.tokens.device
        index = first.to(device)[:, None] + torch.arange(length, device=device)
        tokens = self.tokens[index.clamp_(max=len(self.tokens) - 1)].long()
        labels = torch.from_numpy(self.labels[documents])
        spans = torch.from_numpy(self._spans_of(documents, at))
        return Drawn(tokens, lengths.to(device), labels.to(device), spans.to(device))

    def _spans_of(self, documents: NDArray[np.int64], at: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tell the spans of documents (B,) whose crops begin at tokens (B,)."""
        spans = np.full((len(documents), self._most_spans, 3), -1)
        for row, document, first in zip(spans, documents, at, strict=True):
            start = self._spans_end[document - 1] if document else 0
            own = self._spans[start : self._spans_end[document]]
            row[: len(own)] = own - [0, first, first]
        return spans

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
        of_groups = np.add.reduceat(self.labels[self._grouped].astype(float), self._firsts)
        rates: NDArray[np.float64] = self.shares @ (of_groups / self._counts[:, None])
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
