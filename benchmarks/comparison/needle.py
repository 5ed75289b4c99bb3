"""Needle: eight facts somewhere in a book, and a question about one of them at the end."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.comparison.backbone import Batch
from benchmarks.comparison.documents import gathered
from benchmarks.comparison.task import Recipe, Task
from benchmarks.comparison.texts import Texts
from gma.model.tokenizer import Tokenizer

COLOURS = "red", "blue", "green", "yellow", "black", "white", "brown", "grey"
THINGS = (
    "lantern", "ledger", "anchor", "saddle", "violin", "kettle",
    "compass", "mirror", "pistol", "carpet", "trunk", "bonnet",
)  # fmt: skip

TRAINED = 256, 1024, 4096
JUDGED = {1024: 256, 4096: 128, 16384: 64, 65536: 32, 262144: 16}
"""How many documents of so many tokens models are judged by: about 4 KB to 1 MB."""


class Needle(Task):
    """Trained on short documents, told of long ones too; those are several books, one behind the
    other."""

    def __init__(
        self,
        recipe: Recipe,
        train: Texts,
        held_out: dict[str, Texts],
        tokenizer: Tokenizer,
        device: torch.device,
        trained: tuple[int, ...] = TRAINED,
        judged: dict[int, int] = JUDGED,
    ) -> None:
        super().__init__(recipe, tuple(f"{n:,} tokens" for n in judged), device)
        self.train, self.held_out = train.tokens, {k: v.tokens for k, v in held_out.items()}
        self.trained, self.judged = trained, judged
        self.facts = [
            [_tokens(tokenizer, f"\n\nThe {thing} of Mr. Vane was painted {colour}.\n\n")
             for colour in COLOURS]
            for thing in THINGS
        ]  # fmt: skip
        self.questions = [
            _tokens(tokenizer, f"\n\nWhat was the colour of the {thing} of Mr. Vane?")
            for thing in THINGS
        ]

    def batch(self, seed: int, step: int) -> Batch:
        rng = np.random.default_rng([seed, step])
        length = self.trained[step % len(self.trained)]
        return self._drawn(rng, self.train, max(1, self.recipe.tokens // length), length)

    def examples(self, split: str) -> Iterator[tuple[str, Batch]]:
        text = self.held_out[split]
        for (length, count), column in zip(self.judged.items(), self.columns, strict=True):
            if length > len(text):
                continue
            rows = max(1, min(count, self.recipe.tokens // length))
            for number in range(count // rows):
                rng = np.random.default_rng([length, number])
                yield column, self._drawn(rng, text, rows, length)

    def _drawn(
        self, rng: np.random.Generator, text: NDArray[np.uint16], rows: int, length: int
    ) -> Batch:
        documents, answers = zip(*(self._one(rng, text, length) for _ in range(rows)), strict=True)
        return gathered(documents, length, np.array(answers), self.device)

    def _one(
        self, rng: np.random.Generator, text: NDArray[np.uint16], length: int
    ) -> tuple[NDArray[np.uint16], int]:
        """Draw one document of exactly `length` tokens, and the colour that is asked for."""
        things = rng.permutation(len(THINGS))[: len(COLOURS)]
        colours = rng.permutation(len(COLOURS))
        facts = [self.facts[thing][colour] for thing, colour in zip(things, colours, strict=True)]
        asked = rng.integers(len(things))
        question = self.questions[things[asked]]
        left = length - sum(map(len, facts)) - len(question)
        if left < 0:
            raise ValueError(f"{length} tokens have no room for the facts")
        start = rng.integers(0, len(text) - left + 1)
        pieces = np.split(
            text[start : start + left], np.sort(rng.integers(0, left + 1, len(facts)))
        )
        within = chain.from_iterable(zip(pieces, [*facts, question], strict=True))
        return np.concatenate(list(within)), int(colours[asked])


def _tokens(tokenizer: Tokenizer, text: str) -> NDArray[np.uint16]:
    return tokenizer.encode(text).astype(np.uint16)
