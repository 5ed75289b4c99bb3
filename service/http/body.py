"""A request's body while it arrives, and the client while it stays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import NoReturn

from starlette.types import Receive

from gma.service.errors import Stalled
from gma.service.gateway.admission import Admitted
from gma.service.observe import metrics
from gma.service.observe.traces import Stage


class ClientGone(Exception):
    """The client closed the connection: nobody is there to be answered."""


class Body:
    """One request's body.

    `pump` is the only reader of ASGI's `receive`, from the first byte until the client leaves: two
    readers would take each other's messages. It never waits for whoever reads the pieces, because
    the server in front buffers without bound: only by counting bytes as they come can a limit hold.
    """

    def __init__(self, receive: Receive, admitted: Admitted, *, idle_timeout_s: float) -> None:
        self._receive = receive
        self._admitted = admitted
        self._idle_timeout_s = idle_timeout_s
        self._arrived = bytearray()
        self._complete = False
        self._began = time.monotonic()
        self._ended: float | None = None
        self._news = asyncio.Event()

    async def pump(self) -> NoReturn:
        """Take what arrives. Raises ClientGone, and TooLarge or Overloaded as soon as it is so."""
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            piece = message.get("body", b"")
            self._admitted.count(len(piece))
            self._arrived += piece
            self._complete = not message.get("more_body", False)
            if self._complete:
                self._ended = time.monotonic()
                metrics.RECEIVE_SECONDS.observe(self._ended - self._began)
            self._news.set()

    def stage(self) -> Stage:
        """From its admission to its last byte, or to now."""
        ended = self._ended or time.monotonic()
        return Stage("receive", self._began, ended, ended - self._began)

    async def pieces(self, most: int) -> AsyncGenerator[tuple[bytes, bool]]:
        """What has arrived since the last piece, at most `most` bytes, and whether it is the last.

        Only the last can be empty. Raises Stalled if nothing comes for the idle timeout.
        """
        ended = False
        while not ended:
            if not self._arrived and not self._complete:
                await self._wait()
                continue
            piece = bytes(self._arrived[:most])
            del self._arrived[:most]
            ended = self._complete and not self._arrived
            if piece or ended:
                yield piece, ended

    async def whole(self) -> bytes:
        """All of the body."""
        while not self._complete:
            await self._wait()
        return bytes(self._arrived)

    async def _wait(self) -> None:
        self._news.clear()
        try:
            # Not wait_for: before Python 3.12 it can swallow a cancellation.
            async with asyncio.timeout(self._idle_timeout_s):
                await self._news.wait()
        except TimeoutError:
            raise Stalled(
                f"nothing of the body has arrived for {self._idle_timeout_s:g} s: "
                "send the document again"
            ) from None
