"""Labelled documents as token ids in one flat array."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gma.model.tokenizer import Tokenizer, Tokens
from gma.model.training.errors import CorpusError
from gma.model.training.labelled import LabelledText, Span


@dataclass(frozen=True)
class Spans:
    """n passages of documents that are known to speak for a label, document after document."""

    document: NDArray[np.int64]  # (n,)
    label: NDArray[np.int64]  # (n,): index into the model's labels
    tokens: NDArray[np.int64]  # (n, 2): the document's first token with a byte of it, and the
    # first one after it
    bytes: NDArray[np.int64]  # (n, 2): the same in bytes of the text

    @classmethod
    def of(cls, rows: Sequence[tuple[int, ...]]) -> Spans:
        """Make them of rows of document, label, two tokens and two bytes."""
        table = np.array(rows, np.int64).reshape(-1, 6)
        return cls(table[:, 0], table[:, 1], table[:, 2:4], table[:, 4:])

    def __len__(self) -> int:
        return len(self.document)


NO_SPANS = Spans.of(())


@dataclass(frozen=True)
class Corpus:
    """Documents as token ids, one after the other."""

    tokens: NDArray[np.uint16] | NDArray[np.int32]  # (total,)
    ends: NDArray[np.int64]  # (documents,): where each ends in ``tokens``
    labels: NDArray[np.int64] | NDArray[np.bool_]
    """(documents,): index into the model's labels; or (documents, labels): which it has."""
    spans: Spans = NO_SPANS

    @property
    def multi_label(self) -> bool:
        """Whether documents have any number of labels."""
        return self.labels.ndim == 2

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
        """Tokenize labelled documents, all with a label or all with a list of labels.

        Raises CorpusError for one that is not among ``labels``.
        """
        index = {label: i for i, label in enumerate(labels)}
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
        tokens, ends, found, multi_label = [], [], [], False
        spans: list[tuple[int, ...]] = []
        for number, document in enumerate(documents):
            found.append(indices(document, index))
            encoded = tokenizer.encode(document.text)
            tokens.append(encoded.astype(dtype))
            ends.append(len(encoded))
            multi_label = document.multi_label
            spans += (
                (number, index[span.label], *_tokens_of(span, tokenizer, encoded), *span[1:])
                for span in document.spans
            )
        targets = matrix(found, len(labels)) if multi_label else np.concatenate(found)
        return cls(np.concatenate(tokens), np.cumsum(ends), targets, Spans.of(spans))

    def document_frequency(self, vocab_size: int) -> NDArray[np.int64]:
        """Count how many of the documents use each token, (vocab_size,)."""
        used = np.zeros(vocab_size, dtype=np.int64)
        for index in range(len(self)):
            used[np.unique(self[index])] += 1
        return used

    def save(self, path: Path) -> None:
        """Write raw arrays (``.npz``)."""
        spans = {f"span_{name}": array for name, array in vars(self.spans).items()}
        np.savez(path, tokens=self.tokens, ends=self.ends, labels=self.labels, **spans)

    @classmethod
    def load(cls, path: Path) -> Corpus:
        """Read what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            spans = Spans(**{x.name: arrays[f"span_{x.name}"] for x in fields(Spans)})
            return cls(arrays["tokens"], arrays["ends"], arrays["labels"], spans)


def _tokens_of(span: Span, tokenizer: Tokenizer, tokens: Tokens) -> tuple[int, int]:
    """Find the first of a text's tokens that has a byte of the span, and the first one after it."""
    ends = tokenizer.byte_lengths[tokens].cumsum()
    return int(np.searchsorted(ends, span.start, "right")), int(
        np.searchsorted(ends, span.end, "left") + 1
    )


def indices(document: LabelledText, index: Mapping[str, int]) -> NDArray[np.int64]:
    """Look a document's labels up, (its labels,). Raises CorpusError for one that is not there."""
    for label in document.labels:
        if label not in index:
            raise CorpusError(f"{document.where}: label {label!r} is not among the model's")
    return np.array([index[label] for label in document.labels], dtype=np.int64)


def matrix(found: Sequence[NDArray[np.int64]], labels: int) -> NDArray[np.bool_]:
    """Say which labels documents have, whose indices are ``found``: (documents, labels)."""
    there = np.zeros((len(found), labels), dtype=np.bool_)
    for row, its in zip(there, found, strict=True):
        row[its] = True
    return there
