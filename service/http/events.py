"""An answer in events: NDJSON, or server-sent events."""

from __future__ import annotations

from starlette.types import Send

from gma.service.gateway.contract import ErrorEvent, ProgressEvent, ResultEvent
from gma.service.http.media import SSE, encode


class Events:
    """The events of one answer. Nothing is sent, no status either, before the first."""

    def __init__(self, send: Send, media_type: str) -> None:
        self.begun = False
        self._send = send
        self._media_type = media_type

    async def progress(self, event: ProgressEvent) -> None:
        """Tell how far the document was read; more events follow."""
        await self._write(event, more=True)

    async def end(self, event: ResultEvent | ErrorEvent) -> None:
        """Tell how it ended."""
        await self._write(event, more=False)

    async def _write(self, event: ProgressEvent | ResultEvent | ErrorEvent, *, more: bool) -> None:
        if not self.begun:
            self.begun = True
            headers = [
                (b"content-type", self._media_type.encode()),
                (b"cache-control", b"no-store"),
            ]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        line = encode(event) + b"\n"
        if self._media_type == SSE:
            line = b"event: " + event["event"].encode() + b"\ndata: " + line + b"\n"
        await self._send({"type": "http.response.body", "body": line, "more_body": more})
