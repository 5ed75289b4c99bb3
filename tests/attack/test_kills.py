"""A few kills of those that `python -m tests.attack.kills` makes."""

from __future__ import annotations

import pytest

from tests.attack import kills


@pytest.mark.long
@pytest.mark.slow
def test_clients_hardly_notice() -> None:
    assert kills.failures(kills.run(3, seed=1)) == []


@pytest.mark.parametrize(
    ("outcomes", "found"),
    [
        ({"right": 99, "lost": 1}, []),
        ({"right": 98, "lost": 1, "503": 1}, ["2.00% of requests failed"]),
        ({"right": 999, "refused": 1}, ["1 refused"]),
        ({"right": 999, "wrong": 1}, ["1 wrong"]),
        ({"right": 999, "unexpected 500": 1}, ["1 unexpected 500"]),
    ],
)
def test_failures_are_told(outcomes: dict[str, int], found: list[str]) -> None:
    report = {"outcomes": outcomes, "requests": sum(outcomes.values())}
    assert kills.failures(report) == found
