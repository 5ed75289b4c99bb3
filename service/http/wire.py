"""HTTP/1.1 on one connection, as h11 reads it, with bounds and without what is ambiguous."""

from __future__ import annotations

import re
from typing import Any

import h11
from h11._readers import ChunkedReader, _decode_header_lines

from gma.service.errors import (
    HeadTooLarge,
    NotHttp,
    ServiceError,
    TargetTooLong,
    UnknownTransferCoding,
)

EVENTS_AT_ONCE = 500
"""How many are taken from what has arrived before others get a turn: 5 ms of work. Otherwise the
chunks of one byte in a single segment would hold everybody up for half a second."""

MOST_HEADERS = 100
"""How many a request may have: small ones cost more to read than their bytes say."""

CLOSE = (b"connection", b"close")
BODILESS = (b"GET", b"HEAD", b"OPTIONS")
"""Methods of which nobody here reads a body."""

SCHEMES = (b"http://", b"https://")
VERSIONS = (b"1.0", b"1.1")

Headers = list[tuple[bytes, bytes]]

# With the lines that continue it.
_LENGTH = re.compile(rb"\ncontent-length[ \t]*:([^\n]*(?:\n[ \t][^\n]*)*)", re.IGNORECASE)


def _of_this_host(request: h11.Request) -> h11.Request:
    """The request with a target that begins with its path, as those to proxies do not."""
    scheme = next((each for each in SCHEMES if request.target.lower().startswith(each)), None)
    if scheme is None:
        return request
    _, slash, path = request.target[len(scheme) :].partition(b"/")
    return h11.Request(
        method=request.method,
        headers=list(request.headers),
        target=slash + path or b"/",
        http_version=request.http_version,
    )


class Chunks(ChunkedReader):
    """Reads a body in chunks; its trailers have to be well-formed, and are then forgotten."""

    def __init__(self, head_bytes: int) -> None:
        super().__init__()
        self._head_bytes = head_bytes

    @property
    def place(self) -> str:
        """What of it is too long, if something is."""
        return "trailers have" if self._reading_trailer else "line before a chunk has"

    def __call__(self, buffer: Any) -> h11.Data | h11.EndOfMessage | None:
        if not self._reading_trailer:
            return super().__call__(buffer)
        lines = buffer.maybe_extract_lines()
        if lines is None:
            return None
        if _size(list(_decode_header_lines(lines))) > self._head_bytes:
            raise too_large(self.place, self._head_bytes)
        return h11.EndOfMessage()


class Wire(h11.Connection):
    """The server's side of a connection. Trailers are bounded as a head is, and never seen."""

    def __init__(self, head_bytes: int) -> None:
        """`head_bytes`: the most that a request's line and headers, or its trailers, may have."""
        super().__init__(h11.SERVER, head_bytes)
        self._head_bytes = head_bytes
        self._events = 0
        self._lengths = 0  # that the request has
        self._chunks: Chunks | None = None
        self._bodiless = False
        self.headers: Headers = []
        """Of the request that comes, once they are there."""
        self.refusal: ServiceError | None = None
        """What is wrong with what the client sent, once `next_event` has raised."""

    @property
    def head_begun(self) -> bool:
        """Whether a part of the next request's head has arrived."""
        return self.their_state is h11.IDLE and bool(self.trailing_data[0])

    @property
    def unread(self) -> bool:
        """Whether more may come that belongs to no other request: the rest of a body, or what
        follows something that cannot be read."""
        return self.refusal is not None or self.their_state is h11.SEND_BODY

    @property
    def tired(self) -> bool:
        """Whether `next_event` has put off what has arrived, until `rest`."""
        return self._events >= EVENTS_AT_ONCE

    def rest(self) -> None:
        """Others have had their turn."""
        self._events = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """As h11 has it. Raises RemoteProtocolError with `refusal` set to what it means."""
        if self.tired:
            return h11.NEED_DATA
        self._events += 1
        try:
            if self.head_begun:
                self._check_begin()
            event = super().next_event()
            if isinstance(event, h11.Request):
                self.headers = list(event.headers)
                self._check(event)
                event = _of_this_host(event)
                self._bodiless = event.method in BODILESS
                if isinstance(self._reader, ChunkedReader):
                    self._reader = self._chunks = Chunks(self._head_bytes)
            elif not isinstance(event, h11.Data):
                self._events = 0
        except h11.RemoteProtocolError as error:
            self.refusal = self._refusal(error)
            raise
        except ServiceError as error:
            self.refusal = error
            raise h11.RemoteProtocolError(str(error)) from None
        return event

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]  # of overloads
        """As h11 has it. What is answered without reading the body is this connection's last
        answer, for what still comes would be taken for the next request."""
        early = isinstance(event, h11.Response) and (event.status_code >= 400 or self._bodiless)
        if isinstance(event, h11.Response) and early and self.unread:
            headers = [*(header for header in event.headers if header != CLOSE), CLOSE]
            event = h11.Response(
                status_code=event.status_code, headers=headers, reason=event.reason
            )
        return super().send(event)

    def _check_begin(self) -> None:
        """Pass over an empty line before a request. Raises HeadTooLarge for too many headers."""
        self.headers, self._chunks = [], None
        head = self.trailing_data[0]
        if head.startswith(b"\r\n"):  # some clients send one behind a body
            self._receive_buffer.maybe_extract_at_most(2)
            head = head[2:]
        ends = [at for at in (head.find(b"\n\r\n"), head.find(b"\n\n")) if at >= 0]
        end = min(ends, default=len(head))
        if head.count(b"\n", 0, end) > MOST_HEADERS:
            raise HeadTooLarge(f"the request has more than {MOST_HEADERS} headers")
        # Of equal ones h11 makes one.
        self._lengths = sum(1 + found.count(b",") for found in _LENGTH.findall(head, 0, end))

    def _check(self, request: h11.Request) -> None:
        """Raises NotHttp, TargetTooLong or HeadTooLarge."""
        if request.http_version not in VERSIONS:
            raise NotHttp("send HTTP/1.1: no other version is spoken here")
        chunked = any(name == b"transfer-encoding" for name, _ in self.headers)
        if chunked and self._lengths:
            raise NotHttp("the request has both Content-Length and Transfer-Encoding: send one")
        if self._lengths > 1:
            raise NotHttp("the request has more than one Content-Length: send one")
        if chunked and request.http_version == b"1.0":
            raise NotHttp("HTTP/1.0 has no Transfer-Encoding: send HTTP/1.1")
        if len(request.target) > self._head_bytes:
            raise TargetTooLong(self._head_bytes)
        if len(request.target) + _size(self.headers) > self._head_bytes:
            raise too_large("headers have", self._head_bytes)

    def _refusal(self, error: h11.RemoteProtocolError) -> ServiceError:
        if error.error_status_hint == 501:
            return UnknownTransferCoding()
        if error.error_status_hint == 431:
            # In its first line there is nothing but method and target that can be so long.
            if self._chunks:
                return too_large(self._chunks.place, self._head_bytes)
            if b"\n" not in self.trailing_data[0]:
                return TargetTooLong(self._head_bytes)
            return too_large("headers have", self._head_bytes)
        # Its text can quote what was sent, without bound.
        return NotHttp("what was sent is not a request of HTTP/1.1")


def too_large(what: str, most: int) -> HeadTooLarge:
    """The error to raise for a part of a request that has more than so many bytes."""
    return HeadTooLarge(f"the request's {what} more than {most} bytes in all")


def _size(headers: Headers) -> int:
    """Bytes, with the colon and the end of the line, and a space, as most write it."""
    return sum(len(name) + len(value) + 4 for name, value in headers)
