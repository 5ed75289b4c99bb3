"""What is asked for, what it came to, and the highest rate that keeps it."""

from __future__ import annotations

import math

import pytest

from gma.loadtest.client import Outcome
from gma.loadtest.slo import Slo, quantile
from gma.loadtest.sweep import highest


def outcomes(seconds: list[float], size: int = 100, error: str | None = None) -> list[Outcome]:
    return [Outcome(due=5.0, bytes=size, ended=5.0 + each, error=error) for each in seconds]


class TestQuantile:
    def test_is_one_of_the_values(self) -> None:
        values = list(range(1, 101))
        assert [quantile(values, q) for q in (0.5, 0.99, 0.999)] == [50, 99, 100]
        assert quantile([7], 0.5) == 7
        assert quantile([], 0.5) is None

    def test_does_not_depend_on_order(self) -> None:
        assert quantile([3, 1, 2], 0.5) == 2


class TestSlo:
    @pytest.mark.parametrize("text", ["p99<=1s", "short:p99.9<=0.25s", "huge:p50<=60s"])
    def test_is_read_as_it_is_written(self, text: str) -> None:
        assert str(Slo.parse(text)) == text

    @pytest.mark.parametrize("text", ["", "p99", "p100<=1s", "p0<=1s", "tiny:p99<=1s", "p99<1s"])
    def test_says_how_it_is_written(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"an SLO is like p99<=1s or short:p99<=1s"):
            Slo.parse(text)

    def test_one_in_a_hundred_may_be_late(self) -> None:
        slo = Slo.parse("p99<=1s")
        assert slo.met(outcomes([0.5] * 99 + [9.0]))
        assert not slo.met(outcomes([0.5] * 98 + [9.0] * 2))

    def test_an_error_took_for_ever(self) -> None:
        failed = outcomes([0.001] * 2, error="429")
        assert not Slo.parse("p99<=1s").met(outcomes([0.5] * 98) + failed)
        assert Slo.parse("p99<=1s").value(outcomes([0.5] * 98) + failed) == math.inf
        assert not Slo.parse("p99<=1s").kept_by(failed[0])

    def test_of_a_band_is_not_about_others(self) -> None:
        slo = Slo.parse("short:p99<=1s")
        huge = outcomes([90.0], size=10_000_000)
        assert slo.met(outcomes([0.5]) + huge)
        assert slo.kept_by(huge[0])

    def test_nothing_shows_nothing(self) -> None:
        assert not Slo.parse("huge:p99<=1s").met(outcomes([0.5]))


class TestHighest:
    @pytest.mark.parametrize("capacity", [0.3, 7.0, 100.0])
    def test_is_just_below_what_fails(self, capacity: float) -> None:
        found = highest(lambda rate: rate <= capacity, start=4.0, precision=1.1)
        assert found is not None
        assert capacity / 1.1 <= found <= capacity

    def test_is_none_of_a_server_that_never_meets(self) -> None:
        assert highest(lambda rate: False, start=4.0) is None

    def test_is_the_last_tried_of_one_that_always_meets(self) -> None:
        tried: list[float] = []
        found = highest(lambda rate: not tried.append(rate), start=1.0)  # type: ignore[func-returns-value]
        assert found == max(tried)
