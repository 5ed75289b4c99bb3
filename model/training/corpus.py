"""Labelled documents: JSON Lines in, token ids in one flat array out."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import zstandard
from numpy.typing import NDArray

from gma.model.tokenizer import Tokenizer
from gma.model.training.errors import CorpusError


@dataclass(frozen=True)
class LabelledText:
    """One document of a split; nothing of it is empty."""

    text: str
    label: str
    where: str
    """File and line, for errors."""


def files_of(data: Path, split: str) -> list[Path]:
    """Find the split's ``.jsonl`` and ``.jsonl.zst`` files, in the order of their names.

    Raises CorpusError if there are none.
    """
    found = sorted([*data.glob(f"{split}*.jsonl"), *data.glob(f"{split}*.jsonl.zst")])
    if not found:
        raise CorpusError(f"{data} holds no {split}*.jsonl or {split}*.jsonl.zst")
    return found


def read(data: Path, split: str) -> Iterator[LabelledText]:
    """Yield one split's documents: lines of ``{"text": ..., "label": ...}`` and more.

    Raises CorpusError for the first line that is not such a document, and if there is none.
    """
    empty = True
    for file in files_of(data, split):
        with file.open("rb") as raw:
            for number, line in enumerate(_lines(file, raw), 1):
                if line.strip():
                    yield _parse(line, f"{file}, line {number}")
                    empty = False
    if empty:
        raise CorpusError(f"{data}: the {split} split has no documents")


def _lines(file: Path, raw: BinaryIO) -> Iterator[bytes]:
    if file.suffix != ".zst":
        yield from raw
        return
    decompressor = zstandard.ZstdDecompressor()
    with decompressor.stream_reader(raw, read_across_frames=True) as stream:
        try:
            yield from io.BufferedReader(stream)
        except zstandard.ZstdError as error:
            raise CorpusError(f"{file}: {error}") from error


def _parse(line: bytes, where: str) -> LabelledText:
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where}: not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CorpusError(f"{where}: not an object")
    text, label = fields.get("text"), fields.get("label")
    if not isinstance(text, str) or not text:
        raise CorpusError(f"{where}: 'text' is missing or empty")
    if not isinstance(label, str | int) or isinstance(label, bool):
        raise CorpusError(f"{where}: 'label' is missing, or neither a string nor an integer")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise CorpusError(f"{where}: 'text' is not Unicode: {error}") from error
    return LabelledText(text, str(label), where)


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
