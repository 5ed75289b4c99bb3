"""Media types: which of them a document may have, and which its answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import mimeparse
import msgspec
from starlette.datastructures import Headers

from gma.model.config import LONGEST_INPUT
from gma.service.errors import UnsupportedContent
from gma.service.http.charsets import UTF8, charset_of
from gma.service.http.codings import CODINGS

TEXT, MARKDOWN, JSON = "text/plain", "text/markdown", "application/json"
HTML, PDF = "text/html", "application/pdf"
WORD = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
BINARY = "application/octet-stream"
NDJSON, SSE = "application/x-ndjson", "text/event-stream"

_HINTS = {TEXT: f" (curl -H 'Content-Type: {TEXT}' --data-binary @FILE)"}
_CHARSET = re.compile(r""";\s*charset\s*=\s*["']?([^"';\s]+)""", re.IGNORECASE)


FILES = (HTML, PDF, WORD)
"""Those that have a text in them."""

TEXTS = (TEXT, MARKDOWN, HTML)
"""Those that may be in another charset than UTF-8."""

encode = msgspec.json.encode
"""JSON on one line, in UTF-8."""


def shown(given: str | bytes) -> str:
    """What a message may repeat of what a client sent."""
    start = given[:LONGEST_INPUT]
    return start.decode(errors="replace") if isinstance(start, bytes) else start


class Content(NamedTuple):
    """What a body is."""

    kind: str
    """Its media type, without parameters."""
    charset: str | None = None
    """As Python calls it; None if it is UTF-8."""
    coding: str | None = None
    """How it is compressed, if it is."""


def content_of(headers: Headers, kinds: Sequence[str], *, default: str | None = None) -> Content:
    """What the body is, which has to be of one of `kinds`; `default` if it does not say. Raises
    UnsupportedContent if it is read as none of them."""
    send = "send " + " or ".join(kind + _HINTS.get(kind, "") for kind in kinds)
    types = headers.getlist("content-type")
    if default and not types:
        types = [default]
    if len(types) != 1:
        raise UnsupportedContent(f"the request has {len(types) or 'no'} Content-Type: {send}")
    kind = types[0].partition(";")[0].strip().lower()
    if kind not in kinds:
        raise UnsupportedContent(f"Content-Type {shown(types[0])} is not read here: {send}")
    charsets = [each.lower() for each in _CHARSET.findall(types[0])]
    if len(charsets) > 1:
        raise UnsupportedContent("the Content-Type has more than one charset: send UTF-8")
    charset = None
    if charsets and charsets[0] not in UTF8:
        charset = charset_of(charsets[0])
        if not charset or kind not in TEXTS:
            raise UnsupportedContent(f"charset {shown(charsets[0])} is not read here: send UTF-8")
    coding = ", ".join(headers.getlist("content-encoding")).lower() or "identity"
    if coding not in (*CODINGS, "identity"):
        raise UnsupportedContent(
            f"Content-Encoding {shown(coding)} is not read here: send gzip, zstd or plain bytes"
        )
    return Content(kind, charset, None if coding == "identity" else coding)


def document_type(
    headers: Headers, kinds: Sequence[str] = (TEXT, JSON), *, default: str | None = None
) -> str:
    """Which of `kinds` the body is, in UTF-8 and not compressed; `default` if it does not say.
    Raises UnsupportedContent if it is read as none of them."""
    content = content_of(headers, kinds, default=default)
    if content.charset:
        raise UnsupportedContent(f"charset {content.charset} is not read here: send UTF-8")
    if content.coding:
        raise UnsupportedContent(
            f"Content-Encoding {content.coding} is not read here: send plain bytes"
        )
    return content.kind


def event_type(headers: Headers) -> str | None:
    """NDJSON or SSE if the client prefers it to JSON; None if it wants a single answer."""
    accept = headers.getlist("accept")
    return _preferred_event_type(", ".join(accept).lower()) if accept else None


@lru_cache(128)
def _preferred_event_type(accept: str) -> str | None:
    try:
        # Of what is equally good, the last: who takes anything gets a single answer.
        best = mimeparse.best_match((SSE, NDJSON, JSON), accept)
    except mimeparse.MimeTypeParseException:
        return None
    return best if best in (SSE, NDJSON) else None
