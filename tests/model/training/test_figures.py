"""Figures, in float64 beside scikit-learn's; thresholds; the cross-entropy of several labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from gma.model.training import figures, thresholds
from gma.model.training.cross_entropy import cross_entropy


def drawn(seed: int, documents: int = 60, labels: int = 7) -> tuple[figures.Scores, figures.Labels]:
    """Scores with many ties, and labels that they tell something of; the last has no document."""
    rng = np.random.default_rng(seed)
    actual = rng.random((documents, labels)) < np.linspace(0.7, 0.05, labels)
    actual[:, -1] = False
    return np.round((actual + rng.random(actual.shape) * 2) / 3, 1), actual


@pytest.mark.parametrize("seed", range(5))
def test_as_scikit_learn_has_them(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores, actual = drawn(seed)
    said = scores >= 0.5
    expected = metrics.f1_score(actual, said, average="micro")
    assert figures.micro_f1(said, actual) == pytest.approx(expected, abs=1e-12)
    each = metrics.f1_score(actual, said, average=None, zero_division=np.nan)
    np.testing.assert_allclose(figures.f1(said, actual), each, atol=1e-12)
    assert figures.macro_f1(said, actual) == pytest.approx(np.nanmean(each), abs=1e-12)
    for found, of_label, there in zip(
        figures.average_precisions(scores, actual), scores.T, actual.T, strict=True
    ):
        if there.any():
            assert found == pytest.approx(
                metrics.average_precision_score(there, of_label), abs=1e-12
            )
        else:
            assert math.isnan(found)


def test_f1_of_one_label_each() -> None:
    actual = figures.one_hot(np.array([0, 0, 1, 2]), 5)
    said = figures.one_hot(np.array([0, 1, 1, 3]), 5)
    # 0: precision 1, recall 1/2; 1: precision 1/2, recall 1; 2 never found, 3 only said, 4 neither.
    assert figures.macro_f1(said, actual) == pytest.approx((2 / 3 + 2 / 3 + 0 + 0) / 4)
    assert figures.accuracy(said, actual) == 0.5


def test_calibration_error() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((20_000, 3))
    actual = rng.random(scores.shape) < scores
    assert figures.calibration_error(scores, actual) < 0.01
    assert figures.calibration_error(scores**3, actual) == pytest.approx(0.25, abs=0.01)
    assert figures.calibration_error(np.ones((4, 1)), np.zeros((4, 1), np.bool_)) == 1.0


class TestBestF1:
    @pytest.mark.parametrize("seed", range(5))
    def test_no_other_is_better(self, seed: int) -> None:
        scores, actual = drawn(seed)
        chosen = thresholds.best_f1(scores, actual)
        found = figures.f1(scores >= np.array(chosen), actual)
        own = actual.sum(0) >= thresholds.ENOUGH
        assert own.any()
        assert not own.all()
        for threshold in np.unique(scores):
            others = figures.f1(scores >= threshold, actual)
            assert (found[own] >= others[own] - 1e-12).all()

    def test_the_nearest_to_even(self) -> None:
        actual = np.array([True] * 10 + [False] * 10)[:, None]
        told_apart = np.where(actual, 0.9, 0.2)
        assert thresholds.best_f1(told_apart, actual) == (0.5,)
        (between,) = thresholds.best_f1(told_apart / 2, actual)
        assert between == pytest.approx((0.45 + 0.1) / 2)
        (below_all,) = thresholds.best_f1(np.full((20, 1), 0.3), actual)
        assert below_all == pytest.approx(0.15)

    def test_the_nearest_to_even_of_equally_good_ones(self) -> None:
        """Six of 12 found without a mistake, or all of them with 12: F1 is 2/3 for both."""
        scores = np.array([0.95] * 6 + [0.6] * 12 + [0.52] * 6)[:, None]
        actual = scores != 0.6
        assert thresholds.best_f1(scores, actual) == (0.5,)

    def test_few_take_that_of_all(self) -> None:
        rng = np.random.default_rng(0)
        actual = np.zeros((200, 3), np.bool_)
        actual[:100, 0] = True
        actual[:2, 1] = True
        scores = np.where(actual, 0.4, 0.1) + rng.random(actual.shape) * 0.01
        scores[3, 1] = 0.99
        first, second, third = thresholds.best_f1(scores, actual)
        assert 0.11 < first < 0.4
        assert second == third == pytest.approx(first, abs=0.1)

    def test_nothing_is_there(self) -> None:
        assert thresholds.best_f1(np.ones((3, 2)), np.zeros((3, 2), np.bool_)) == (0.5, 0.5)


def test_thresholds_that_lose_a_share_of_right_answers() -> None:
    rng = np.random.default_rng(0)
    first = rng.random(1000) / 2 + 0.5
    scores = np.stack([first, 1 - first], 1)
    scores[900:] = scores[900:, ::-1]
    actual = scores == scores.max(1, keepdims=True)
    actual[:100] = actual[:100, ::-1]  # wrongly answered: they don't count
    for lost in (0.0, 0.05, 0.3):
        for label, chosen in enumerate(thresholds.keeping(scores, actual, lost)):
            right = scores[actual[:, label] & (scores.argmax(1) == label), label]
            assert (right < chosen).mean() == pytest.approx(lost, abs=0.02)
    few = thresholds.keeping(scores[895:905], actual[895:905], 0.5)
    assert few[0] == few[1]


class TestCrossEntropy:
    def test_is_each_label_s(self) -> None:
        torch.manual_seed(0)
        logits = torch.randn(5, 4, dtype=torch.float64) * 3
        labels = torch.rand(5, 4) < 0.4
        p = logits.sigmoid()
        expected = -torch.where(labels, p.log(), (1 - p).log()).sum(1)
        torch.testing.assert_close(cross_entropy(logits, labels), expected)
        assert cross_entropy(logits * 1e30, labels).isfinite().all()

    def test_of_one_label(self) -> None:
        logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
        for smoothing in 0.0, 0.2:
            found = cross_entropy(logits, labels, smoothing=smoothing).mean()
            expected = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
            torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
    def test_who_knows_the_rates_alone_has_their_entropy(self, smoothing: float) -> None:
        labels = torch.zeros(100, 2, dtype=torch.bool)
        labels[:1, 0] = labels[:30, 1] = True
        rates = labels.double().mean(0)
        logits = rates.logit().expand(100, 2)
        entropy = -(rates * rates.log() + (1 - rates) * (1 - rates).log()).sum()
        found = cross_entropy(logits, labels, smoothing=smoothing, rates=rates).mean()
        torch.testing.assert_close(found, entropy)
