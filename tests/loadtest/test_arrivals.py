"""When documents arrive."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest

from gma.loadtest.arrivals import BURST_PERIOD_S, BURST_SHARE, PROFILES, arrivals


@pytest.mark.parametrize("profile", PROFILES)
def test_ascending_within_the_time_and_the_same_again(profile: str) -> None:
    times = arrivals(profile, 50, 30, seed=1)
    assert times == sorted(times) == arrivals(profile, 50, 30, seed=1)
    assert times[0] >= 0
    assert times[-1] < 30


def test_constant() -> None:
    assert arrivals("constant", 4, 1) == [0, 0.25, 0.5, 0.75]


def test_poisson_gaps_are_exponential() -> None:
    gaps = [b - a for a, b in pairwise(arrivals("poisson", 100, 100))]
    assert statistics.mean(gaps) == pytest.approx(0.01, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.01, rel=0.05)


def test_bursts_keep_the_mean_rate_and_come_at_once() -> None:
    times = arrivals("bursts", 50, 100)
    assert len(times) == pytest.approx(5000, rel=0.05)
    assert all(time % BURST_PERIOD_S <= BURST_PERIOD_S * BURST_SHARE for time in times)


def test_ramp_rises_evenly_to_its_rate() -> None:
    times = arrivals("ramp", 100, 100)
    assert len(times) == pytest.approx(5000, rel=0.05)
    assert sum(time < 50 for time in times) == pytest.approx(1250, rel=0.1)
    assert sum(time > 90 for time in times) / 10 == pytest.approx(95, rel=0.1)


def test_seeds_differ() -> None:
    assert arrivals("poisson", 10, 10, seed=0) != arrivals("poisson", 10, 10, seed=1)


@pytest.mark.parametrize("rate", [0, -1, float("inf"), float("nan")])
def test_rate_must_be_one(rate: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        arrivals("poisson", rate, 10)


def test_says_which_profiles_there_are() -> None:
    with pytest.raises(ValueError, match="poisson, constant, bursts, ramp, not 'steady'"):
        arrivals("steady", 1, 1)
