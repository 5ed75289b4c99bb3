"""Labelled documents as token ids in one flat array."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gma.model.tokenizer import Tokenizer
from gma.model.training.errors import CorpusError
from gma.model.training.labelled import LabelledText


@dataclass(frozen=True)
class Corpus:
    """Documents as token ids, one after the other."""

    tokens: NDArray[np.uint16] | NDArray[np.int32]  # (total,)
    ends: NDArray[np.int64]  # (documents,): where each ends in ``tokens``
    labels: NDArray[np.int64]  # (documents,): index into the model's labels

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> NDArray[np.uint16] | NDArray[np.int32]:
        """Return one document's ids, (tokens,)."""
        start = self.ends[index - 1] if index else 0
        return self.tokens[start : self.ends[index]]

    @classmethod
    def encode(
        cls, documents: Iterable[LabelledText], tokenizer: Tokenizer, labels: tuple[str, ...]
    ) -> Corpus:
        """Tokenize labelled documents; a label that is not among ``labels`` is a CorpusError."""
        index = {label: i for i, label in enumerate(labels)}
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
        tokens, ends, targets = [], [], []
        for document in documents:
            if document.label not in index:
                raise CorpusError(
                    f"{document.where}: label {document.label!r} is not among the train split's"
                )
            tokens.append(tokenizer.encode(document.text).astype(dtype))
            ends.append(len(tokens[-1]))
            targets.append(index[document.label])
        return cls(np.concatenate(tokens), np.cumsum(ends), np.asarray(targets))

    def document_frequency(self, vocab_size: int) -> NDArray[np.int64]:
        """Count how many of the documents use each token, (vocab_size,)."""
        used = np.zeros(vocab_size, dtype=np.int64)
        for index in range(len(self)):
            used[np.unique(self[index])] += 1
        return used

    def save(self, path: Path) -> None:
        """Write raw arrays (``.npz``)."""
        np.savez(path, tokens=self.tokens, ends=self.ends, labels=self.labels)

    @classmethod
    def load(cls, path: Path) -> Corpus:
        """Read what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["tokens"], arrays["ends"], arrays["labels"])
