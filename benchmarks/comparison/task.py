"""What every task is: batches to train on, examples to be judged by, and a budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.comparison.backbone import Backbone, Batch
from benchmarks.comparison.sizes import Size
from benchmarks.comparison.trainer import Trainer, narrow


class Recipe(NamedTuple):
    """How large a task's models are, and how long they are trained."""

    size: Size
    steps: int
    tokens: int
    """Of a step."""
    pretraining: int = 0
    """Steps on the task's own text before, where they are not left out."""


class Task(ABC):
    """Batches, examples and what is told of a model."""

    lower = False
    """Whether less is better."""

    def __init__(self, recipe: Recipe, columns: tuple[str, ...], device: torch.device) -> None:
        self.recipe, self.columns, self.device = recipe, columns, device

    @abstractmethod
    def batch(self, seed: int, step: int) -> Batch:
        """Return what is trained on in a step, always the same for the same seed."""

    @abstractmethod
    def examples(self, split: str) -> Iterator[tuple[str, Batch]]:
        """Yield what a model is judged by on valid or test, each with its column."""

    @torch.no_grad()
    def evaluate(self, model: Backbone, split: str, trainer: Trainer) -> dict[str, float]:
        """Return how much of what is asked is answered right, by column. Raises OutOfTime."""
        model.eval()
        right: dict[str, Tensor] = {}
        asked: Counter[str] = Counter()
        for column, batch in self.examples(split):
            trainer.check_time()
            with narrow(self.device):
                found, count = answered(model, batch)
            right[column] = right.get(column, found.new_zeros(())) + found
            asked[column] += count
        return {column: float(right[column]) / asked[column] for column in right}

    def score(self, found: dict[str, float]) -> float:
        """Return what models are chosen by: the mean over the columns."""
        return sum(found.values()) / len(found)


def generator(device: torch.device, *seed: int) -> torch.Generator:
    """Make a generator that no other seed's resembles."""
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0] >> np.uint64(1)))


def answered(model: Backbone, batch: Batch) -> tuple[Tensor, int]:
    """Count what a model answers right, of how much is asked."""
    if batch.targets.dim() == 1:
        hits = model.label_logits(batch).argmax(-1) == batch.targets
    else:
        wanted = batch.targets >= 0
        hidden = model.hidden(batch.tokens, batch.lengths)[wanted]
        hits = model.token_logits(hidden).argmax(-1) == batch.targets[wanted]
    return hits.sum(), hits.numel()
