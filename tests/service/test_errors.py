"""Errors: what each tells clients, and what the documentation says of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gma.service.errors import ServiceError

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
