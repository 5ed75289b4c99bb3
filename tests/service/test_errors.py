"""Errors: each has its status, and arrives in another process as it was raised."""

from __future__ import annotations

import pickle

import pytest

from gma.service import errors
from gma.service.errors import ServiceError

EXAMPLES = [
    ServiceError("a"),
    errors.BadRequest("a"),
    errors.EmptyDocument(),
    errors.NotUtf8(7),
    errors.NotUtf8(),
    errors.NotJson("a"),
    errors.Unauthorized("a"),
    errors.NotFound("a"),
    errors.MethodNotAllowed("a", "GET"),
    errors.Stalled("a"),
    errors.WrongOffset(3, 4),
    errors.TooLarge(10),
    errors.UnsupportedContent("a"),
    errors.Invalid("a"),
    errors.Overloaded("a"),
    errors.StepFailed("a"),
    errors.Unavailable("a"),
    errors.NotReady("a"),
    errors.ShuttingDown("a"),
    errors.UnknownDocument("a"),
]


def kinds(root: type[ServiceError]) -> set[type[ServiceError]]:
    return {root}.union(*map(kinds, root.__subclasses__()))


def test_the_examples_are_all_there_are() -> None:
    assert {type(error) for error in EXAMPLES} == kinds(ServiceError)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_survives_the_way_to_another_process(error: ServiceError) -> None:
    arrived = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)
    assert arrived.headers == error.headers


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_trying_again_is_told_when_it_helps(error: ServiceError) -> None:
    assert ("retry-after" in error.headers) == (error.status in (429, 503))


def test_types_tell_errors_apart() -> None:
    named = [kind.error_type for kind in kinds(ServiceError)]
    assert len(set(named)) == len(named)


def test_a_wrong_offset_tells_the_right_one() -> None:
    assert errors.WrongOffset(3, 4).expected == 3
    assert "must be 3" in str(errors.WrongOffset(3, 4))
