"""From logits to scores to labels."""

from __future__ import annotations

import pytest
import torch

from gma.model.config import ModelConfig
from gma.model.scores import labels_of, scores
from tests.model.small import SMALL

LOGITS = torch.tensor([[2.0, 1.0, -1.0], [-3.0, -3.0, -4.0], [0.0, 0.0, 0.0]], dtype=torch.float64)


def said(**changes: object) -> list[list[int]]:
    config = ModelConfig.model_validate({**SMALL.model_dump(), **changes})
    there = labels_of(config, scores(config, LOGITS))
    assert there.dtype == torch.bool
    return [row.nonzero().flatten().tolist() for row in there]


def test_one_label() -> None:
    assert said() == [[0], [0], [0]]  # the first of equals
    torch.testing.assert_close(scores(SMALL, LOGITS), LOGITS.softmax(1))


def test_one_label_or_none() -> None:
    assert said(thresholds=(0.5, 0.0, 0.0)) == [[0], [], []]
    third = LOGITS[2].softmax(0)[0].item()
    assert said(thresholds=(third, 0.0, 0.0))[2] == [0]  # reached


def test_any_number() -> None:
    config = SMALL.model_copy(update={"multi_label": True})
    torch.testing.assert_close(scores(config, LOGITS), 1 / (1 + (-LOGITS).exp()))
    assert said(multi_label=True) == [[0, 1], [], [0, 1, 2]]
    assert said(multi_label=True, thresholds=(0.9, 0.04, 0.0)) == [[1, 2], [1, 2], [1, 2]]


@pytest.mark.parametrize("shape", [(3,), (2, 2, 3)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    assert labels_of(SMALL, torch.zeros(shape)).shape == shape
