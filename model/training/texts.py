"""Documents without labels as token ids, in files that are mapped into memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gma.model.tokenizer import Tokenizer
from gma.model.training.errors import CorpusError

Ids: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32]

PIECE = 1 << 20
"""Bytes that are tokenized at a time."""


@dataclass(frozen=True)
class Texts:
    """Documents, one after the other."""

    tokens: Ids  # (total,)
    ends: NDArray[np.int64]  # (documents,): where each ends in ``tokens``

    def __len__(self) -> int:
        return len(self.ends)

    @classmethod
    def encode(cls, texts: Iterable[str], tokenizer: Tokenizer, file: Path) -> Texts:
        """Tokenize texts and write them to ``file`` and another beside it; raises OSError."""
        dtype, ends, end = _dtype(tokenizer), [], 0
        with file.open("wb") as out:
            for text in texts:
                data, stream = text.encode(), tokenizer.stream()
                for start in range(0, len(data), PIECE):
                    ids = stream.feed(data[start : start + PIECE])
                    end += out.write(ids.astype(dtype).tobytes())
                end += out.write(stream.finish().astype(dtype).tobytes())
                ends.append(end // np.dtype(dtype).itemsize)
        np.save(_ends(file), np.array(ends, dtype=np.int64))
        return cls.load(tokenizer, file)

    @classmethod
    def load(cls, tokenizer: Tokenizer, file: Path) -> Texts:
        """Map what ``encode`` wrote with the same tokenizer."""
        return cls(np.memmap(file, _dtype(tokenizer), "r"), np.load(_ends(file)))

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(np.diff(self.ends, prepend=0).max())

    def draw(
        self, rng: np.random.Generator, rows: int, length: int, start_fraction: float
    ) -> tuple[Tensor, Tensor]:
        """Draw crops, as many from a document as it has tokens: tokens (B, N) int64, lengths (B,).

        ``start_fraction`` of them begin where their document begins. A crop of a document that is
        shorter is the whole of it, and zeros follow.
        """
        documents = np.searchsorted(self.ends, rng.integers(0, self.ends[-1], rows), side="right")
        starts = self.ends[documents - 1] * (documents > 0)
        sizes = self.ends[documents] - starts
        at = rng.integers(0, np.maximum(sizes - length, 0) + 1)
        at[rng.random(rows) < start_fraction] = 0
        return self.crops(starts + at, np.minimum(sizes, length), length)

    def windows(self, length: int, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Cut documents into windows of ``length``: where they start, and their lengths.

        If they have more than ``most`` tokens together, some are left out, equally far apart.
        Raises CorpusError if none has two tokens.
        """
        begin = np.concatenate([[0], self.ends[:-1]])
        found = [np.arange(a, b - 1, length) for a, b in zip(begin, self.ends, strict=True)]
        starts = np.concatenate(found)
        if not len(starts):
            raise CorpusError("no document of valid has two tokens: nothing can be measured")
        lengths = np.minimum(np.repeat(self.ends, [*map(len, found)]) - starts, length)
        every = max(1, -(-int(lengths.sum()) // most))
        return starts[::every], lengths[::every]

    def crops(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64], length: int
    ) -> tuple[Tensor, Tensor]:
        """Read crops: tokens (B, length) int64, with zeros after each; lengths (B,)."""
        tokens = np.zeros((len(starts), length), dtype=np.int64)
        for row, start, size in zip(tokens, starts, lengths, strict=True):
            row[:size] = self.tokens[start : start + size]
        return torch.from_numpy(tokens), torch.from_numpy(lengths)


def _dtype(tokenizer: Tokenizer) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def _ends(file: Path) -> Path:
    return file.with_suffix(".ends.npy")
