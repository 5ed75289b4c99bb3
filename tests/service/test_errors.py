"""Errors: what each tells clients, and what the documentation says of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gma.service.errors import MOST_RETRY_S, Overloaded, ServiceError, retry_after
from gma.service.gateway.admission import Admission
from gma.service.link.messages import decode_error, encode_error
from gma.service.settings import Settings

API = Path(__file__).parent.parent.parent / "docs" / "api.md"


def kinds(root: type[ServiceError]) -> Iterator[type[ServiceError]]:
    yield root
    for kind in root.__subclasses__():
        yield from kinds(kind)


def documented() -> dict[str, int]:
    """By `error_type` the status that docs/api.md gives it."""
    found: dict[str, int] = {}
    for line in API.read_text().splitlines():
        statuses, _, names = line.removeprefix("| ").partition(" | `")
        if re.fullmatch(r"4\d\d(, 4\d\d)*|5\d\d", statuses):
            each = re.findall(r"[A-Z]\w+", names.partition(" | ")[0])
            codes = [int(status) for status in statuses.split(", ")]
            found |= dict(zip(each, codes if len(codes) > 1 else codes * len(each), strict=True))
    return found


def test_clients_get_what_is_documented() -> None:
    """Beside the root, a kind with kinds of its own is never raised."""
    raised: list[type[ServiceError]] = [ServiceError]
    raised += [kind for kind in kinds(ServiceError) if not kind.__subclasses__()]
    told: dict[str, int] = {kind.error_type: kind.status for kind in raised}
    assert told == documented()


@pytest.mark.parametrize("kind", [*kinds(ServiceError)])
def test_trying_again_is_told_when_it_helps(kind: type[ServiceError]) -> None:
    assert (kind.retry_after_s is not None) == (kind.status in (429, 503))


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.0, 1), (0.2, 1), (1.0, 1), (1.1, 2), (1e9, MOST_RETRY_S)]
)
def test_when_to_try_again_is_told_in_whole_seconds(seconds: float, told: int) -> None:
    assert retry_after(seconds) == told


def test_when_to_try_again_goes_from_a_worker_to_a_gateway() -> None:
    error = decode_error(encode_error(Overloaded("2 documents are waiting", 7)))
    assert (str(error), error.retry_after_s) == ("2 documents are waiting", 7)
    assert error.headers == {"retry-after": "7"}


def test_a_gateway_that_is_full_tells_how_long_documents_take(checkpoint: Path) -> None:
    admission = Admission(Settings.load(checkpoint=checkpoint, max_documents_in_flight=1))
    told = []
    for seconds in (None, 7.2, 27.2):
        if seconds:
            admission.answered(seconds)
        with admission.admit(), pytest.raises(Overloaded) as refused, admission.admit():
            pass
        told.append(refused.value.retry_after_s)
    assert told == [1, 8, 10]  # the last document weighs a tenth
