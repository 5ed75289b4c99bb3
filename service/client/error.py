"""What a client raises: the service's own errors, and connections that were lost.

ServiceError               the service has answered, and not with what was asked for
ConnectionError, of Python
└── ConnectionLost         nobody answers, or the connection broke
TimeoutError, of Python    nothing has happened for as long as the client waits
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from gma.service import errors

MOST_SHOWN = 200
"""Characters of an answer that is not the service's."""


class ConnectionLost(ConnectionError):
    """The service can't be reached, or the connection ended before the answer did."""


class ServiceError(Exception):
    """An answer that says what is wrong. `str(error)` is that, for people."""

    def __init__(
        self,
        message: str,
        status: int,
        error_type: str | None = None,
        retry_after_s: int | None = None,
        request_id: str | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(message, status, error_type, retry_after_s, request_id, offset)
        self.message = message
        self.status = status
        """Of HTTP."""
        self.error_type = error_type
        """The name that programs know it by; None if it was not the service that answered, but
        something in front of it."""
        self.retry_after_s = retry_after_s
        """Seconds until it is worth trying again, if that was told."""
        self.request_id = request_id
        """The service's log has it."""
        self.offset = offset
        """Of a session: the bytes that it has, where that was not what the request said."""

    def __str__(self) -> str:
        return self.message

    @classmethod
    def answered(cls, status: int, headers: Mapping[str, str], body: bytes) -> ServiceError:
        """The error that an answer tells; headers' names in lower case."""
        try:
            told: Any = json.loads(body)
            message, error_type = told["error"], told["error_type"]
        except (ValueError, LookupError, TypeError):
            text = " ".join(body.decode(errors="replace").split())[:MOST_SHOWN]
            told, error_type = {}, None
            message = f"status {status}, and no answer of the service: {text or 'nothing'}"
        offset = told.get("offset", headers.get("upload-offset"))
        return cls(
            message,
            status,
            error_type,
            _number(headers.get("retry-after")),
            headers.get("x-request-id"),
            _number(offset),
        )

    @classmethod
    def told(cls, event: Mapping[str, str], request_id: str | None) -> ServiceError:
        """The error that is the last event of an answer whose status was 200."""
        error_type = event["error_type"]
        status = next(
            (each.status for each in _errors() if each.error_type == error_type),
            errors.ServiceError.status,
        )
        return cls(event["error"], status, error_type, request_id=request_id)


def _number(given: object) -> int | None:
    text = str(given)
    return int(text) if text.isascii() and text.isdigit() else None


def _errors(
    above: type[errors.ServiceError] = errors.ServiceError,
) -> Iterator[type[errors.ServiceError]]:
    for each in above.__subclasses__():
        yield each
        yield from _errors(each)
