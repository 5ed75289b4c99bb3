"""From logits to scores to labels."""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from gma.model.config import ModelConfig
from gma.model.scores import labels_of, log_odds, scores
from gma.service.gateway import scores as gateway
from tests.model.small import ANY, SMALL

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


def test_log_odds_of_evidence() -> None:
    """Nothing overflows or cancels out, whatever the sums."""
    sums = [1e-30, 1e-17, 1e-8, 1e-3, 0.1, 0.6931, 1.0, 5.0, 36.0, 40.0, 700.0, 1e6]
    with localcontext(prec=60):
        expected = [float((Decimal(x).exp() - 1).ln()) for x in sums]
    found = log_odds(torch.tensor(sums, dtype=torch.float64))
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-14)
    config = ModelConfig.model_validate({**SMALL.model_dump(), **ANY})
    np.testing.assert_allclose(
        gateway.logits_of(config, np.array(sums), 9.0), expected, 1e-14, 1e-14
    )
    given = scores(config, found)
    np.testing.assert_allclose(given, -np.expm1(-np.array(sums)), 1e-12)


def test_no_evidence_is_a_score_of_nothing() -> None:
    config = ModelConfig.model_validate({**SMALL.model_dump(), **ANY})
    found = log_odds(torch.zeros(3))
    assert found.isfinite().all()
    assert scores(config, found).max() < 1e-29
    assert log_odds(torch.tensor([torch.nan])).isnan().all()


@pytest.mark.parametrize("wrong", [{"multi_label": False}, {"prior_tokens": 1.0}])
def test_pooling_any_goes_with_multi_label_and_no_prior(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="pooling any"):
        ModelConfig.model_validate({**SMALL.model_dump(), **ANY, **wrong})


@pytest.mark.parametrize("shape", [(3,), (2, 2, 3)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    assert labels_of(SMALL, torch.zeros(shape)).shape == shape
