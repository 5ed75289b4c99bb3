"""What logits say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gma.model import scores as model_scores
from gma.service import odds
from gma.service.gateway.scores import scores
from tests.model.small import SMALL

LOGITS = np.array([[0.0, 1.5, -2.0], [1e4, -1e4, 40.0]])


def test_odds_are_the_models() -> None:
    sums = np.array([0.0, 1e-40, 1e-30, 1e-8, 0.1, 1.0, 40.0, 1e6])
    expected = model_scores.log_odds(torch.from_numpy(sums)).numpy()
    np.testing.assert_allclose(odds.log_odds(sums), expected, rtol=1e-14)


def test_softmax_sums_to_one() -> None:
    found = scores(LOGITS, multi_label=False)
    np.testing.assert_allclose(found[0], np.exp(LOGITS[0]) / np.exp(LOGITS[0]).sum())
    np.testing.assert_allclose(found.sum(1), 1)


@pytest.mark.filterwarnings("error")
def test_sigmoid_is_of_each_label_alone() -> None:
    found = scores(LOGITS, multi_label=True)
    np.testing.assert_allclose(found[0], 1 / (1 + np.exp(-LOGITS[0])), rtol=1e-15)
    assert found[1].tolist() == [1.0, 0.0, 1.0]
    assert found[0, 0] == 0.5, "just what is there without thresholds"


def test_small_scores_are_as_exact_as_large_ones() -> None:
    assert scores(np.array([-700.0]), multi_label=True)[0] == pytest.approx(np.exp(-700), rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"multi_label": True}, (0.5, 0.5, 0.5)),
        ({"thresholds": (0.0, 0.2, 1.0)}, (0.0, 0.2, 1.0)),
        ({"multi_label": True, "thresholds": (0.0, 0.2, 1.0)}, (0.0, 0.2, 1.0)),
    ],
)
def test_thresholds(changes: dict[str, object], expected: tuple[float, ...] | None) -> None:
    assert SMALL.model_copy(update=changes).least_scores == expected


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("least", [None, (0.0, 0.3, 0.9), (0.5, 0.5, 1.0)])
def test_training_and_the_gateway_say_the_same(
    multi_label: bool, least: tuple[float, ...] | None
) -> None:
    """One has no torch, the other is measured with it."""
    config = SMALL.model_copy(
        update={"labels": ("a", "b", "c"), "multi_label": multi_label, "thresholds": least}
    )
    logits = np.random.default_rng(0).normal(size=(64, 3)) * 4
    found = scores(logits, multi_label)
    tensor = model_scores.scores(config, torch.from_numpy(logits))
    np.testing.assert_allclose(found, tensor.numpy(), rtol=1e-12)
    own = config.least_scores or (0.0,) * 3
    there = found >= own
    if not multi_label:
        there &= found == found.max(1, keepdims=True)
    assert (model_scores.labels_of(config, tensor).numpy() == there).all()
