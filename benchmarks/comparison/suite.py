"""The tasks, the most telling first: how large their models are, and how long they are trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.comparison import listops, states
from benchmarks.comparison.documents import Documents, Prefixes, Splits
from benchmarks.comparison.language import Language
from benchmarks.comparison.needle import Needle
from benchmarks.comparison.recall import Recall
from benchmarks.comparison.sizes import Size
from benchmarks.comparison.states import States
from benchmarks.comparison.task import Recipe, Task
from benchmarks.comparison.texts import LONGEST_REVIEW, TOKENIZER, Texts
from gma.model.tokenizer import Tokenizer

VOCABULARY = 16384
"""Tokens of the tokenizer of `books`."""

RECIPES = {
    "language": Recipe(Size(384, 6, vocabulary=VOCABULARY), 320, 65536),
    "recall": Recipe(Size(128, 2, vocabulary=1024), 2400, 32768),
    "states": Recipe(Size(128, 2, vocabulary=states.VOCABULARY), 2400, 32768),
    "needle": Recipe(Size(256, 4, vocabulary=VOCABULARY, labels=8), 600, 65536, 200),
    "listops": Recipe(Size(256, 4, vocabulary=listops.VOCABULARY, labels=10), 600, 65536, 200),
    "books": Recipe(Size(384, 6, vocabulary=VOCABULARY, labels=40), 240, 65536, 320),
    "imdb": Recipe(Size(256, 4, vocabulary=256, labels=2), 600, 65536, 300),
    "grain": Recipe(Size(256, 4, vocabulary=VOCABULARY, labels=4), 300, 65536, 200),
}

NEEDS = {
    "language": ("books", "prose"),
    "needle": ("books",),
    "listops": ("listops",),
    "books": ("books",),
    "imdb": ("imdb",),
    "grain": ("grain",),
}
"""Which texts a task reads; the others make theirs as they go."""

MADE = {"train": 16000, "valid": 1000, "test": 2000}
"""Documents of ListOps, which need no data but a minute."""

GRAIN = 8192
"""Tokens of a document of 32 KB."""


def tiny(recipe: Recipe) -> Recipe:
    """Return a recipe of so few steps that it says nothing, for a model of one layer."""
    size = recipe.size._replace(width=128, layers=1, routing=16, components=16)
    return Recipe(size, 2, 256, min(recipe.pretraining, 1))


def build(name: str, texts: Path, device: torch.device, *, quick: bool = False) -> Task:
    """Make a task of texts in a folder; `quick`: one that says nothing.

    Raises FileNotFoundError if a text is not there.
    """
    recipe = tiny(RECIPES[name]) if quick else RECIPES[name]
    made: dict[str, Callable[[], Task]] = {
        "language": lambda: _language(recipe, texts, device, quick),
        "recall": lambda: Recall(recipe, device, *(((2, 4), 8) if quick else ())),
        "states": lambda: States(recipe, device, *((16, (16, 32), 4) if quick else ())),
        "needle": lambda: _needle(recipe, texts, device, quick),
        "listops": lambda: _listops(recipe, texts, device, quick),
        "books": lambda: Prefixes(
            recipe, _splits(texts, "books"), _tokenizer().byte_lengths, device,
            *(((1, 2),) if quick else ()),
        ),
        "imdb": lambda: Documents(
            recipe, _splits(texts, "imdb"), 128 if quick else LONGEST_REVIEW, device,
            8 if quick else 12500,
        ),
        "grain": lambda: Documents(
            recipe, _splits(texts, "grain"), 128 if quick else GRAIN, device, 8 if quick else 4096
        ),
    }  # fmt: skip
    return made[name]()


def _tokenizer() -> Tokenizer:
    return Tokenizer.load(TOKENIZER)


def _splits(texts: Path, name: str) -> Splits:
    return Splits(*(Texts.load(texts / f"{name}-{split}.npz") for split in Splits._fields))


def _language(recipe: Recipe, texts: Path, device: torch.device, quick: bool) -> Task:
    books = _splits(texts, "books")
    prose, unseen = (Texts.load(texts / f"prose-{split}.npz") for split in ("train", "valid"))
    train = books.train, prose
    held_out = {"valid": {"books": books.valid}, "test": {"books": books.test, "prose": unseen}}
    lengths = torch.from_numpy(_tokenizer().byte_lengths)
    few = ((64, 128), 2) if quick else ()
    return Language(recipe, train, held_out, lengths, device, *few)


def _needle(recipe: Recipe, texts: Path, device: torch.device, quick: bool) -> Task:
    books = _splits(texts, "books")
    held_out = {"valid": books.valid, "test": books.test}
    few = ((256,), {256: 2}) if quick else ()
    return Needle(recipe, books.train, held_out, _tokenizer(), device, *few)


def _listops(recipe: Recipe, texts: Path, device: torch.device, quick: bool) -> Task:
    if quick:
        few = (listops.documents(20, seed, 10, 100) for seed in range(3))
        return Documents(recipe, Splits(*few), 128, device)
    return Documents(recipe, _splits(texts, "listops"), listops.LONGEST, device)


def make_listops(texts: Path) -> None:
    """Make ListOps's documents, which are the same wherever they are made."""
    for seed, (split, count) in enumerate(MADE.items()):
        listops.documents(count, seed).save(texts / f"listops-{split}.npz")
