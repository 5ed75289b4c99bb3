"""Random crops of labelled documents: what a training step reads."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gma.model.training.corpus import Corpus


class Crops:
    """Random crops of random documents, each label as often as any other, on the device."""

    def __init__(self, train: Corpus, start_fraction: float, device: torch.device) -> None:
        """Crop the documents of ``train``.

        ``start_fraction``: share of the crops that begin where their document begins.
        """
        self.start_fraction = start_fraction
        self.tokens = torch.from_numpy(train.tokens.astype(np.int32)).to(device)
        self.starts = np.concatenate([[0], train.ends[:-1]])
        self.ends = train.ends
        self.by_label = [np.flatnonzero(train.labels == i) for i in np.unique(train.labels)]
        self.labels = train.labels
        self.longest = int((self.ends - self.starts).max())
        """Tokens of the longest document: no crop needs to be longer."""

    def draw(
        self, rng: np.random.Generator, rows: int, length: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw ``rows`` crops: tokens (B, N) int64, lengths (B,), labels (B,).

        A crop of a document that is shorter than ``length`` is the whole of it; what follows it
        in its row is nobody's.
        """
        # Every label once before any twice.
        rounds = -(-rows // len(self.by_label))
        order = np.concatenate([rng.permutation(len(self.by_label)) for _ in range(rounds)])[:rows]
        documents = np.array([rng.choice(self.by_label[label]) for label in order])
        sizes = self.ends[documents] - self.starts[documents]
        at = rng.integers(0, np.maximum(sizes - length, 0) + 1)
        at[rng.random(rows) < self.start_fraction] = 0
        lengths = torch.from_numpy(np.minimum(sizes, length))
        first = torch.from_numpy(self.starts[documents] + at)
        device = self.tokens.device
        index = first.to(device)[:, None] + torch.arange(length, device=device)
        tokens = self.tokens[index.clamp_(max=len(self.tokens) - 1)].long()
        return tokens, lengths.to(device), torch.from_numpy(self.labels[documents]).to(device)
