"""Texts as tokens: made once of the data, small enough to be carried, and read by all runs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.checkpoints import BOOKS
from benchmarks.timing import progress
from gma.model.tokenizer import Tokenizer

TOKENIZER = BOOKS / "tokenizer.json"

STRETCH = 16384
"""Tokens that are kept of a book: the first ones, about 64 KB."""

LONGEST_REVIEW = 4096

Tokens = NDArray[np.uint16] | NDArray[np.uint8]


class Texts(NamedTuple):
    """Documents one after the other."""

    tokens: Tokens  # (total,)
    ends: NDArray[np.int64]  # (documents,): where each ends in tokens
    labels: NDArray[np.int64]  # (documents,)

    @classmethod
    def of(cls, documents: Iterable[Tokens], labels: Iterable[int]) -> Self:
        kept = list(documents)
        ends = np.cumsum([len(each) for each in kept])
        return cls(np.concatenate(kept), ends, np.asarray(list(labels), dtype=np.int64))

    @property
    def starts(self) -> NDArray[np.int64]:
        return np.concatenate([[0], self.ends[:-1]])

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self.ends - self.starts

    def save(self, file: Path) -> None:
        """Write the arrays, compressed; nobody sees a part of a file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        with part.open("wb") as made:
            np.savez_compressed(made, **self._asdict())
        part.replace(file)

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read what `save` wrote. Raises FileNotFoundError that says how to make it."""
        if not file.exists():
            raise FileNotFoundError(f"{file} is not there: make it with --prepare {file.stem}")
        with np.load(file, allow_pickle=False) as arrays:
            return cls(arrays["tokens"], arrays["ends"], arrays["labels"])


class Source(NamedTuple):
    """Which texts are kept of a folder of the data, and how."""

    folder: str
    splits: dict[str, str]  # of ours: how the folder's files begin
    longest: int = STRETCH
    as_bytes: bool = False
    every: int = 1  # of so many documents of train, one is kept
    labelled: bool = True


ALL = {split: split for split in ("train", "valid", "test")}

SOURCES = {
    "books": Source("books", ALL),
    "prose": Source("prose", {"train": "train", "valid": "valid"}, every=3, labelled=False),
    "imdb": Source("imdb", ALL, LONGEST_REVIEW, as_bytes=True),
    "grain": Source("order", {split: f"grain-{split}" for split in ALL}),
}


def prepare(data: Path, out: Path, names: Iterable[str]) -> None:
    """Make the texts of these names, in all their splits."""
    from gma.model.training.splits import Splits  # needs packages that runs do without

    tokenizer = Tokenizer.load(TOKENIZER)
    for name in names:
        source, labels = SOURCES[name], dict[str, int]()
        for split, prefix in source.splits.items():
            file = out / f"{name}-{split}.npz"
            documents, targets = [], []
            for number, text in enumerate(Splits(data / source.folder).read(prefix)):
                if split == "train" and number % source.every:
                    continue
                documents.append(_encoded(text.text, tokenizer, source))
                targets.append(text.label)
            if split == "train":
                labels = {label: number for number, label in enumerate(sorted(set(targets)))}
            numbers = [labels[label] if source.labelled else -1 for label in targets]
            Texts.of(documents, numbers).save(file)
            progress(f"{file}: {len(documents)} documents, {file.stat().st_size / 1e6:.1f} MB")


def _encoded(text: str, tokenizer: Tokenizer, source: Source) -> Any:
    if source.as_bytes:
        return np.frombuffer(text.encode()[: source.longest], dtype=np.uint8)
    # A token of English is about 4 characters long.
    return tokenizer.encode(text[: source.longest * 5]).astype(np.uint16)[: source.longest]
