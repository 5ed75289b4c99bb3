"""Documents of a batch: lines that are sent, and lines that come back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from typing import Any

from gma.service.client.error import ServiceError
from gma.service.python.answer import Answer

Item = str | Mapping[str, Any]
"""A text; or one with its options and an `id`, as the service takes it: `{"id", "text", ...}`."""

Items = Iterable[Item] | AsyncIterable[Item]

Told = tuple[str | int, Answer | ServiceError]
"""An item's `id`, or its number from 1 on if it has none, and what was answered."""


def lines(items: Items) -> Iterator[bytes] | AsyncIterator[bytes]:
    """The items as they are sent, one by one. Raises TypeError for a text in place of several."""
    if isinstance(items, str | bytes | Mapping):
        raise TypeError("a batch is an iterable of texts: put one into a list")
    return _later(items) if isinstance(items, AsyncIterable) else map(_line, items)


def told(line: bytes, request_id: str | None) -> Told:
    """What a line says. Raises ServiceError if it is about the batch itself."""
    answer = json.loads(line)
    if "error" not in answer:
        return answer["id"], Answer.of(answer)
    error = ServiceError(
        answer["error"],
        answer["status"],
        answer["error_type"],
        answer.get("retry_after_s"),
        request_id,
    )
    if "line" not in answer:
        raise error
    return answer["id"], error


def _line(item: Item) -> bytes:
    return json.dumps({"text": item} if isinstance(item, str) else dict(item)).encode() + b"\n"


async def _later(items: AsyncIterable[Item]) -> AsyncIterator[bytes]:
    async for item in items:
        yield _line(item)
