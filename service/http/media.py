"""Media types: which of them a document may have, and which its answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers

from gma.service.errors import UnsupportedContent

TEXT, JSON = "text/plain", "application/json"
NDJSON, SSE = "application/x-ndjson", "text/event-stream"

_CHARSET = re.compile(r""";\s*charset\s*=\s*["']?([^"';\s]+)""", re.IGNORECASE)


def document_type(headers: Headers) -> str:
    """TEXT or JSON, whichever the body is. Raises UnsupportedContent if it is read as neither."""
    send = f"send {TEXT} (curl -H 'Content-Type: {TEXT}' --data-binary @FILE) or {JSON}"
    given = headers.get("content-type")
    if given is None:
        raise UnsupportedContent(f"the request has no Content-Type: {send}")
    kind = _kind(given)
    if kind not in (TEXT, JSON):
        raise UnsupportedContent(f"Content-Type {given} is not read here: {send}")
    charset = _CHARSET.search(given)
    if charset and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedContent(f"charset {charset[1]} is not read here: send UTF-8")
    coding = headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        raise UnsupportedContent(f"Content-Encoding {coding} is not read here: send plain bytes")
    return kind


def event_type(headers: Headers) -> str | None:
    """NDJSON or SSE, whichever the client names first; None if it wants a single answer."""
    kinds = map(_kind, headers.get("accept", "").split(","))
    return next((kind for kind in kinds if kind in (NDJSON, SSE)), None)


def encode(answer: Mapping[str, Any]) -> bytes:
    """JSON on one line, in UTF-8."""
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()


def _kind(media_type: str) -> str:
    """A media type without its parameters."""
    return media_type.partition(";")[0].strip().lower()
