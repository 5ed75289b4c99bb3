"""What logits say."""

from __future__ import annotations

import numpy as np
import pytest

from gma.service.gateway.scores import scores, thresholds
from tests.model.small import SMALL

LOGITS = np.array([[0.0, 1.5, -2.0], [1e4, -1e4, 40.0]])


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
    assert thresholds(SMALL.model_copy(update=changes)) == expected
