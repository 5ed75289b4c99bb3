"""An answer in events: NDJSON, or server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.types import Message, Send

from gma.service.gateway.contract import ErrorEvent, ProgressEvent, ResultEvent
from gma.service.http.media import SSE, encode

HEARTBEAT_S = 10.0
"""How long server-sent events are silent before a comment says that somebody is there: proxies
close what is silent for a minute."""

HEARTBEAT = b":\n\n"

HEADERS = [
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would keep events until there are some kilobytes
]


class Events:
    """The events of one answer. Nothing is sent, no status either, before the first, or before the
    first heartbeat of server-sent ones."""

    def __init__(self, send: Send, media_type: str) -> None:
        self.begun = False
        self._send = send
        self._media_type = media_type
        self._sending: asyncio.Task[None] | None = None
        self._silence: asyncio.TimerHandle | None = None
        self._await_silence()

    async def progress(self, event: ProgressEvent) -> None:
        """Tell how far the document was read. Does not wait for the client: one that has not yet
        taken what it was told before is not told this."""
        self._say(self.encoded(event))

    async def end(self, event: bytes) -> None:
        """Tell how it ended: `event`, encoded."""
        self._stop_heart()
        if self._sending:
            await self._sending
        await self._write(event, more=False)

    def stop(self) -> None:
        """Tell nothing more."""
        self._stop_heart()
        if self._sending:
            self._sending.cancel()

    def encoded(self, event: ProgressEvent | ResultEvent | ErrorEvent) -> bytes:
        """An event as it is sent."""
        line = encode(event) + b"\n"
        if self._media_type == SSE:
            line = b"event: " + event["event"].encode() + b"\ndata: " + line + b"\n"
        return line

    def _say(self, event: bytes) -> None:
        if not self._sending or self._sending.done():
            self._sending = asyncio.create_task(self._write(event, more=True))
            self._await_silence()

    def _await_silence(self) -> None:
        self._stop_heart()
        if self._media_type == SSE:
            loop = asyncio.get_running_loop()
            self._silence = loop.call_later(HEARTBEAT_S, self._beat)

    def _beat(self) -> None:
        self._await_silence()
        self._say(HEARTBEAT)

    def _stop_heart(self) -> None:
        if self._silence:
            self._silence.cancel()

    def _write(self, event: bytes, *, more: bool) -> Coroutine[Any, Any, None]:
        body: Message = {"type": "http.response.body", "body": event, "more_body": more}
        if self.begun:
            return self._send_all(body)
        self.begun = True
        headers = [(b"content-type", self._media_type.encode()), *HEADERS]
        start: Message = {"type": "http.response.start", "status": 200, "headers": headers}
        return self._send_all(start, body)

    async def _send_all(self, *messages: Message) -> None:
        for message in messages:
            await self._send(message)
