"""A short run of what `python -m tests.attack.mutations` does at length."""

from __future__ import annotations

from tests.attack.mutations import ask, leave, repeat
from tests.attack.target import Target


def test_requests_with_mistakes(attacked: Target) -> None:
    answers = repeat(attacked, ask, 200, seed=1)
    assert {200, 400, 401, 404} <= answers.keys()


def test_clients_that_leave(attacked: Target) -> None:
    repeat(attacked, leave, 200, seed=1)
