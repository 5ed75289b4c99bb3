"""Documents of a few labels: what every token says is summed up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.comparison.backbone import Batch
from benchmarks.comparison.task import Recipe, Task
from benchmarks.comparison.texts import Texts

KB = 1024


class Splits(NamedTuple):
    train: Texts
    valid: Texts
    test: Texts


class Documents(Task):
    """Documents as they are, up to a longest; each is in a batch with those about as long."""

    def __init__(
        self, recipe: Recipe, splits: Splits, longest: int, device: torch.device, judged: int = 4096
    ) -> None:
        """`judged`: documents that models are judged by, at most."""
        super().__init__(recipe, ("accuracy",), device)
        self.splits, self.judged = splits, judged
        self.rooms = longest // 4, longest // 2, longest
        self.held = self._held(splits.train.lengths)
        # Each document as often as any other, though a step has fewer of the longer.
        share = np.array([n * len(each) for n, each in zip(self.rooms, self.held, strict=True)])
        self.share = share / share.sum()

    def _held(self, lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return the documents that each room is the smallest for; the last takes all others."""
        room = np.searchsorted(self.rooms[:-1], lengths)
        return [np.flatnonzero(room == number) for number in range(len(self.rooms))]

    def batch(self, seed: int, step: int) -> Batch:
        rng = np.random.default_rng([seed, step])
        number = rng.choice(len(self.rooms), p=self.share)
        rows = max(1, self.recipe.tokens // self.rooms[number])
        return self._read(self.splits.train, rng.choice(self.held[number], rows), number)

    def examples(self, split: str) -> Iterator[tuple[str, Batch]]:
        texts = getattr(self.splits, split)
        for number, held in enumerate(self._held(texts.lengths[: self.judged])):
            rows = max(1, self.recipe.tokens // self.rooms[number])
            for first in range(0, len(held), rows):
                yield self.columns[0], self._read(texts, held[first : first + rows], number)

    def _read(self, texts: Texts, documents: NDArray[np.int64], number: int) -> Batch:
        starts, room = texts.starts[documents], self.rooms[number]
        ends = np.minimum(texts.ends[documents], starts + room)
        parts = [texts.tokens[a:b] for a, b in zip(starts, ends, strict=True)]
        return gathered(parts, room, texts.labels[documents], self.device)


class Prefixes(Task):
    """Long documents: trained on crops of several lengths, told of prefixes of several."""

    def __init__(
        self,
        recipe: Recipe,
        splits: Splits,
        byte_lengths: NDArray[np.int32],
        device: torch.device,
        kilobytes: tuple[int, ...] = (1, 4, 16, 64),
    ) -> None:
        """byte_lengths (vocabulary,): of tokens."""
        super().__init__(recipe, tuple(f"{n} KB" for n in kilobytes), device)
        self.splits, self.byte_lengths, self.kilobytes = splits, byte_lengths, kilobytes

    def batch(self, seed: int, step: int) -> Batch:
        rng = np.random.default_rng([seed, step])
        length = KB // 4 * self.kilobytes[step % len(self.kilobytes)]  # a token is 4 bytes or so
        texts = self.splits.train
        documents = rng.integers(len(texts.ends), size=max(1, self.recipe.tokens // length))
        sizes = texts.lengths[documents]
        starts = texts.starts[documents] + rng.integers(0, np.maximum(sizes - length, 0) + 1)
        ends = np.minimum(texts.ends[documents], starts + length)
        parts = [texts.tokens[a:b] for a, b in zip(starts, ends, strict=True)]
        return gathered(parts, length, texts.labels[documents], self.device)

    def examples(self, split: str) -> Iterator[tuple[str, Batch]]:
        texts = getattr(self.splits, split)
        for column, kilobytes in zip(self.columns, self.kilobytes, strict=True):
            parts = [self._prefix(texts, n, kilobytes * KB) for n in range(len(texts.ends))]
            room = max(map(len, parts))
            rows = max(1, self.recipe.tokens // room)
            for first in range(0, len(parts), rows):
                labels = texts.labels[first : first + rows]
                yield column, gathered(parts[first : first + rows], room, labels, self.device)

    def _prefix(self, texts: Texts, number: int, most: int) -> NDArray[np.uint16]:
        document = texts.tokens[texts.starts[number] : texts.ends[number]]
        fitting = np.searchsorted(self.byte_lengths[document].cumsum(), most, side="right")
        prefix: NDArray[np.uint16] = document[: max(1, int(fitting))]
        return prefix


def gathered(
    parts: Sequence[NDArray[np.uint16]],
    room: int,
    labels: NDArray[np.int64],
    device: torch.device,
) -> Batch:
    """Make a batch of documents' tokens, each filled up to `room`."""
    tokens = np.zeros((len(parts), room), dtype=np.int64)
    for row, part in zip(tokens, parts, strict=True):
        row[: len(part)] = part
    lengths = torch.tensor([len(part) for part in parts], device=device)
    return Batch(torch.from_numpy(tokens).to(device), lengths, torch.from_numpy(labels).to(device))
