"""An answer in events: NDJSON, or server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.types import Message, Send

from gma.service.gateway.contract import ErrorEvent, ProgressEvent, ResultEvent
from gma.service.http.media import SSE, encode


class Events:
    """The events of one answer. Nothing is sent, no status either, before the first."""

    def __init__(self, send: Send, media_type: str) -> None:
        self.begun = False
        self._send = send
        self._media_type = media_type
        self._sending: asyncio.Task[None] | None = None

    async def progress(self, event: ProgressEvent) -> None:
        """Tell how far the document was read. Does not wait for the client: one that has not yet
        taken what it was told before is not told this."""
        if not self._sending or self._sending.done():
            self._sending = asyncio.create_task(self._write(self.encoded(event), more=True))

    async def end(self, event: bytes) -> None:
        """Tell how it ended: `event`, encoded."""
        if self._sending:
            await self._sending
        await self._write(event, more=False)

    def stop(self) -> None:
        """Tell nothing more."""
        if self._sending:
            self._sending.cancel()

    def encoded(self, event: ProgressEvent | ResultEvent | ErrorEvent) -> bytes:
        """An event as it is sent."""
        line = encode(event) + b"\n"
        if self._media_type == SSE:
            line = b"event: " + event["event"].encode() + b"\ndata: " + line + b"\n"
        return line

    def _write(self, event: bytes, *, more: bool) -> Coroutine[Any, Any, None]:
        body: Message = {"type": "http.response.body", "body": event, "more_body": more}
        if self.begun:
            return self._send_all(body)
        self.begun = True
        headers = [(b"content-type", self._media_type.encode()), (b"cache-control", b"no-store")]
        start: Message = {"type": "http.response.start", "status": 200, "headers": headers}
        return self._send_all(start, body)

    async def _send_all(self, *messages: Message) -> None:
        for message in messages:
            await self._send(message)
