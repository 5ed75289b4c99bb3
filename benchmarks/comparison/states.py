"""State tracking: which of five cups holds the ball after each of many swaps.

The swaps generate the permutations of five things, whose word problem no shallow sum of what was
written solves at every length.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from benchmarks.comparison.backbone import Batch
from benchmarks.comparison.task import Recipe, Task, generator

CUPS = 5
SWAPS = tuple(combinations(range(CUPS), 2))
VOCABULARY = len(SWAPS) + CUPS
"""The swaps, and then the cups: where the ball is at first, and what is asked."""

TRAINED = 128
JUDGED = 128, 512, 2048


class States(Task):
    """Trained at one length, and told of the last half of swaps at it and at greater ones."""

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        trained: int = TRAINED,
        judged: tuple[int, ...] = JUDGED,
        rows: int = 256,
    ) -> None:
        super().__init__(recipe, tuple(f"{n:,} swaps" for n in judged), device)
        self.trained, self.judged, self.rows = trained, judged, rows
        moved = torch.arange(CUPS).repeat(len(SWAPS), 1)
        for number, (one, other) in enumerate(SWAPS):
            moved[number, [one, other]] = torch.tensor([other, one])
        self.moved = moved.to(device)  # (swaps, cups): where what is in a cup is after a swap

    def batch(self, seed: int, step: int) -> Batch:
        rows = self.recipe.tokens // self.trained
        return self._drawn(rows, self.trained, (0, seed, step))

    def examples(self, split: str) -> Iterator[tuple[str, Batch]]:
        for number, (swaps, column) in enumerate(zip(self.judged, self.columns, strict=True)):
            batch = self._drawn(self.rows, swaps, (1, split == "test", number))
            batch.targets[:, : swaps // 2] = -100
            yield column, batch

    def _drawn(self, rows: int, swaps: int, seed: tuple[int, ...]) -> Batch:
        drawing = generator(self.device, *seed)

        def drawn(most: int, *shape: int) -> Tensor:
            return torch.randint(most, shape, device=self.device, generator=drawing)

        first, chosen = drawn(CUPS, rows, 1), drawn(len(SWAPS), rows, swaps)
        places = composed(self.moved[chosen]).gather(2, first[..., None].expand(-1, swaps, -1))
        both = torch.cat([first, places[..., 0]], 1) + len(SWAPS)
        tokens = torch.cat([both[:, :1], chosen], 1)
        lengths = torch.full((rows,), swaps + 1, device=self.device)
        return Batch(tokens, lengths, both)


def composed(moved: Tensor) -> Tensor:
    """Compose permutations (B, N, cups) with all before them, in as many rounds as N has digits."""
    reach = 1
    while reach < moved.shape[1]:
        later = moved[:, reach:].gather(2, moved[:, :-reach])
        moved = torch.cat([moved[:, :reach], later], 1)
        reach *= 2
    return moved
