"""Associative recall: pairs of a key and a value, and then every key once more, in another order.

After Arora et al. 2023 (arXiv:2312.04927), with all keys asked for at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.comparison.backbone import Batch
from benchmarks.comparison.task import Recipe, Task, generator

PAIRS = 4, 8, 16, 32, 64, 128


class Recall(Task):
    """Trained on all numbers of pairs in turns, and told of each."""

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        pairs: tuple[int, ...] = PAIRS,
        judged: int = 1024,
    ) -> None:
        """Half of the vocabulary are keys, and the other half values."""
        super().__init__(recipe, tuple(f"{n} pairs" for n in pairs), device)
        self.pairs, self.judged = pairs, judged

    def batch(self, seed: int, step: int) -> Batch:
        pairs = self.pairs[step % len(self.pairs)]
        return self._drawn(self.recipe.tokens // (3 * pairs), pairs, (0, seed, step))

    def examples(self, split: str) -> Iterator[tuple[str, Batch]]:
        for number, (pairs, column) in enumerate(zip(self.pairs, self.columns, strict=True)):
            yield column, self._drawn(self.judged, pairs, (1, split == "test", number))

    def _drawn(self, rows: int, pairs: int, seed: tuple[int, ...]) -> Batch:
        drawing = generator(self.device, *seed)
        half = self.recipe.size.vocabulary // 2

        def drawn(*shape: int) -> torch.Tensor:
            return torch.rand(shape, device=self.device, generator=drawing)

        keys = drawn(rows, half).topk(pairs).indices
        values = (drawn(rows, pairs) * half).long() + half
        order = drawn(rows, pairs).argsort()
        tokens = torch.cat([torch.stack([keys, values], 2).flatten(1), keys.gather(1, order)], 1)
        targets = torch.full_like(tokens, -100)
        targets[:, 2 * pairs :] = values.gather(1, order)
        return Batch(tokens, torch.full((rows,), 3 * pairs, device=self.device), targets)
