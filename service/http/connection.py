"""One client's connection: uvicorn's, with an end to everything that a client can draw out."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import h11
from starlette.datastructures import Headers
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from gma.service.errors import ServiceError, Stalled
from gma.service.http.media import JSON, encode
from gma.service.http.middleware import REQUEST_ID, error_answer, request_id
from gma.service.http.room import Room
from gma.service.http.wire import Wire
from gma.service.observe import metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a connection may cost."""

    head_bytes: int = 32 * 1024
    """Of a request's line and headers together; of its trailers; of a line before a chunk."""
    head_s: float = 20.0
    """From a connection's begin, or a request's first byte, until its head is complete."""
    keep_alive_s: int = 75
    """How long a connection may have nothing to do; longer than the pools of clients keep one."""
    send_s: float = 20.0
    """How long a client that does not read is waited for: in each such time it has to take
    `SENT_BYTES` of an answer."""
    close_s: float = 30.0
    """After an answer that is a connection's last: how long what still comes is dropped, since a
    connection that is closed on a client that sends takes the answer with it."""
    quiet_s: float = 5.0
    """The same while nothing comes."""


SENT_BYTES = 16 * 1024

PROBE_S = 0.5
"""After how long whoever has closed the sending side is looked after, and then twice as long."""


class Connection(H11Protocol):
    """A protocol of asyncio's, as uvicorn makes one for each connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: Limits,
        room: Room,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn: Wire = Wire(limits.head_bytes)
        self._limits = limits
        self._room = room
        self._ended = False  # the client will send no more
        self._close_by = 0.0
        self._deadline: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._socket = transport
        super().connection_made(Closing(transport, self))
        if self._room.enter(self):
            self._within(self._limits.head_s, self._head_is_late)
        else:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._room.leave(self)
        self._within(0, None)
        if self._sending:
            self._sending.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            self._close_within(self._close_by - self.loop.time())
            return
        super().data_received(data)
        self._look()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more: it may wait for its answer, or be gone."""
        if not self._owed:
            return False
        self._ended = True
        self._within(PROBE_S, self._probe, PROBE_S)
        return True

    def on_response_complete(self) -> None:
        unread = self.conn.unread
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if unread or (self._ended and not self._owed):
            self.transport.close()
        elif self.conn.their_state is h11.IDLE:
            self._room.rest(self)
            self._look()

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this when the wire has refused what came."""
        assert self.conn.refusal
        self._refuse(self.conn.refusal)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        if self._sending and not self.transport.is_closing():
            self._sending.cancel()
            self._sending = None
        super().resume_writing()

    def shutdown(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def finish(self) -> None:
        """Close once what was sent has gone out, or the client has taken too long. To the
        application the client of a request that is not answered has left."""
        if self.cycle and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._room.rest(self)
        if self.conn.unread:
            self._close_by = self.loop.time() + self._limits.close_s
            self._close_within(self._limits.close_s)
            self._socket.write_eof()
            self._socket.resume_reading()
            return
        self._within(0, None)
        if not self._sending:
            self._watch_sending()
        self._socket.close()

    def abort(self) -> None:
        """Close at once, and have the kernel forget what it holds for the client."""
        with socket.socket(fileno=os.dup(self._socket.get_extra_info("socket").fileno())) as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.abort()

    @property
    def _owed(self) -> bool:
        """Whether a request has wholly arrived, and its answer has not gone out."""
        cycle = self.cycle
        return bool(cycle) and not (cycle.more_body or cycle.response_complete)

    def _within(self, seconds: float, then: Callable[..., None] | None, *args: object) -> None:
        """Do something unless this is called again within so long."""
        if self._deadline:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(seconds, then, *args) if then else None

    def _close_within(self, seconds: float) -> None:
        self._within(min(self._limits.quiet_s, seconds), self.abort)

    def _head_is_late(self) -> None:
        if self.conn.head_begun:
            self._refuse(Stalled(f"no complete request within {self._limits.head_s:g} s"))
        else:
            self.transport.close()

    def _refuse(self, error: ServiceError) -> None:
        """Answer with an error, unless an answer has begun, and close."""
        name = request_id(Headers(raw=self.conn.headers))
        cycle = self.cycle
        if not cycle or cycle.response_complete or not cycle.response_started:
            self._socket.write(refusal(error, name))
        self.transport.close()
        metrics.REQUESTS.labels("other", str(error.status)).inc()
        fields = {"id": name, "status": error.status, "error_type": error.error_type}
        logger.info("request refused", extra={"fields": fields})

    def _look(self) -> None:
        """See how far what has arrived brings its request."""
        if self.transport.is_closing():
            return
        if self.conn.their_state is not h11.IDLE:
            self._within(0, None)
            self._room.work(self)
        elif self.conn.head_begun and not self._deadline:
            self._within(self._limits.head_s, self._head_is_late)
        if self.conn.tired:
            self._socket.pause_reading()
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Read on, others having had their turn."""
        self.conn.rest()
        if self.transport.is_closing():
            return
        self.handle_events()
        self._look()
        if not (self.conn.tired or self.flow.read_paused or self.transport.is_closing()):
            self._socket.resume_reading()

    def _probe(self, waited_s: float) -> None:
        """Find out whether a client that sends no more still reads: what it gets, if it is gone,
        is answered with a reset. Clients pass over 100 Continue, whether they asked or not."""
        if self._owed and not self.cycle.response_started and self.scope["http_version"] == "1.1":
            event = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            self._socket.write(self.conn.send(event) or b"")
            self._within(2 * waited_s, self._probe, 2 * waited_s)

    def _watch_sending(self, before: int | None = None) -> None:
        """Abort unless the client goes on taking what it is sent."""
        left = self._socket.get_write_buffer_size()
        if before is not None and left > before - SENT_BYTES:
            self.abort()
        else:
            self._sending = self.loop.call_later(self._limits.send_s, self._watch_sending, left)


class Closing(asyncio.Transport):
    """A transport that its connection closes: what uvicorn sees of one."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        super().__init__()
        self._transport = transport
        self._connection = connection
        self._closing = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._transport.write(data)

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        if not self._connection.conn.tired:
            self._transport.resume_reading()

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        if not self.is_closing():
            self._closing = True
            self._connection.finish()


def refusal(error: ServiceError, name: str) -> bytes:
    """The whole answer to what is not a request, or none that is read on. `name`: its id."""
    content = encode(error_answer(error))
    phrase = HTTPStatus(error.status).phrase
    lines = (
        f"HTTP/1.1 {error.status} {phrase}",
        f"content-type: {JSON}",
        f"content-length: {len(content)}",
        f"{REQUEST_ID}: {name}",
        "connection: close",
    )
    return "\r\n".join([*lines, "", ""]).encode() + content
