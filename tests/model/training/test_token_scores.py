"""The tokens' own scores: what they are told by, and that valid chooses it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.progress import Progress

from gma.model.training.corpus import Corpus
from gma.model.training.crops import Crops
from gma.model.training.token_scores import TokenScores, TokenScoresConfig, distinct, fit
from tests.model.small import SMALL

VOCABULARY = 50
MODEL = SMALL.model_copy(update={"labels": ("a", "b"), "vocab_size": VOCABULARY})
FEW = {"steps": 60, "crops": 32, "length": 128}

Text = Callable[[np.random.Generator, int], NDArray[np.int64]]


def often(rng: np.random.Generator, label: int) -> NDArray[np.int64]:
    """All documents have the same tokens; a label says which of two stands there more often."""
    return rng.permutation(np.concatenate([np.arange(10), [label] * 10, [1 - label] * 3]))


def there(rng: np.random.Generator, label: int) -> NDArray[np.int64]:
    """One token among many, of a length that says nothing, tells the label; another hides it."""
    noise = rng.integers(10, VOCABULARY, 1 + 60 * rng.integers(0, 2))
    hidden = np.full(rng.integers(0, 20), 2)
    return rng.permutation(np.concatenate([noise, hidden, [label]]))


def corpus(text: Text, seed: int, documents: int = 60) -> Corpus:
    rng = np.random.default_rng(seed)
    labels = np.arange(documents) % 2
    texts = [text(rng, int(label)).astype(np.uint16) for label in labels]
    return Corpus(np.concatenate(texts), np.cumsum([*map(len, texts)]), labels)


def fitted(text: Text, **changes: object) -> TokenScores:
    train, valid = corpus(text, 0), corpus(text, 1)
    crops = Crops(train, 1.0, torch.device("cpu"), balance=1.0)
    config = TokenScoresConfig.model_validate({**FEW, **changes})
    return fit(crops, train, valid, MODEL, config, Progress(disable=True))


def right(scores: TokenScores, text: Text) -> float:
    test = corpus(text, 2)
    means = [scores.scores[test[i].astype(np.int64)].mean(0) for i in range(len(test))]
    return float(np.mean(torch.stack(means).argmax(1).numpy() == test.labels))


def test_how_often_a_token_is_there_tells() -> None:
    scores = fitted(often)
    assert right(scores, often) == 1.0
    assert scores.parts["share"].weight > scores.parts["presence"].weight


@pytest.mark.parametrize("text", [often, there])
def test_valid_chooses(text: Text) -> None:
    scores = fitted(text)
    assert right(scores, text) >= 0.9
    assert scores.parts.keys() == {"presence", "share"}
    for part in scores.parts.values():
        assert len(part.tried) == 6
        assert part.tried[part.decay] == min(part.tried.values())


def test_what_is_said_is_not_chosen() -> None:
    scores = fitted(often, counted="presence", decay=0.01)
    (part,) = scores.parts.values()
    assert [*scores.parts] == ["presence"]
    assert [*part.tried] == [part.decay] == [0.01]


def test_distinct_tokens_of_rows() -> None:
    tokens = torch.tensor([[3, 1, 3, 9], [9, 9, 9, 9], [0, 0, 0, 2], [5, 5, 5, 5]])
    found, times, counts = distinct(tokens, torch.tensor([3, 1, 4, 0]), 10)
    assert found.tolist() == [1, 3, 9, 0, 2]
    assert times.tolist() == [1, 2, 1, 3, 1]
    assert counts.tolist() == [2, 1, 2, 0]
