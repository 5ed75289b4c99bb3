"""Requests that nobody has to fear."""

from __future__ import annotations

from tests.service.asgi import TEXT

KEY = "a-key"
DOCUMENT = TEXT.encode() * 3
"""A document of several chunks."""

SIZE = f"Content-Length: {len(DOCUMENT)}"


def head(*lines: str, method: str = "POST", path: str = "/v1/documents", key: bool = True) -> bytes:
    """A request's line and headers."""
    own = ["Host: service", "Content-Type: text/plain"]
    if key:
        own.append(f"Authorization: Bearer {KEY}")
    return "\r\n".join([f"{method} {path} HTTP/1.1", *own, *lines, "", ""]).encode()


HONEST = head(SIZE) + DOCUMENT
PROBE = b"GET /health HTTP/1.1\r\nHost: service\r\n\r\n"
LARGE = head(method="GET", path="/openapi.json")
"""It has an answer of many KB."""
