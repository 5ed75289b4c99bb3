"""A request's body while it arrives, and the client while it stays."""

from __future__ import annotations

import asyncio
import time
from codecs import BOM_UTF8
from collections import deque
from collections.abc import AsyncGenerator
from functools import partial
from typing import NoReturn

from starlette.types import Receive

from gma.service.errors import Stalled
from gma.service.gateway.admission import Admitted
from gma.service.gateway.document import PIECE_BYTES
from gma.service.observe import metrics
from gma.service.observe.traces import Stage
from gma.service.settings import CPU_GRID, Settings

LOOK_S = 2.0
"""How often it is measured how fast a body comes."""


class ClientGone(Exception):
    """The client closed the connection: nobody is there to be answered."""


class Body:
    """One request's body.

    `pump` is the only reader of ASGI's `receive`, from the first byte until the client leaves: two
    readers would take each other's messages. It never waits for whoever reads the pieces, because
    the server in front may buffer without bound: only by counting bytes as they come can a limit
    hold.
    """

    def __init__(self, receive: Receive, admitted: Admitted, settings: Settings) -> None:
        self._receive = receive
        self._admitted = admitted
        self._arrived: deque[bytearray] = deque()  # pieces: full ones, and the last
        self._complete = False
        self._began = time.monotonic()
        self._ended: float | None = None
        self._news = asyncio.Event()
        # A token is at least a byte: with less there is no chunk for a worker to read. And a byte
        # order mark comes with what it marks.
        self._first_bytes = max(settings.chunk_tokens or CPU_GRID[1], len(BOM_UTF8) + 1)
        self._look_s = min(LOOK_S, settings.idle_timeout_s)
        self._idle_timeout_s = settings.idle_timeout_s
        self._min_rate = settings.min_upload_rate
        looks = max(1, round(settings.idle_timeout_s / self._look_s))
        self._received = deque([0], maxlen=looks + 1)  # bytes, at each look

    async def pump(self) -> NoReturn:
        """Take what arrives. Raises ClientGone, TooLarge or Overloaded as soon as it is so, and
        Stalled if it comes too slowly."""
        try:
            async with asyncio.timeout(None) as deadline:
                self._admitted.sends(give_up=partial(_end_now, deadline))
                self._look_again(deadline)
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    self._take(message.get("body", b""))
                    if not message.get("more_body", False):
                        self._end()
                    self._news.set()
        except TimeoutError:
            raise Stalled(
                f"the body comes at less than {self._min_rate} bytes a second, or has stopped: "
                "send the document again"
            ) from None
        finally:
            self._admitted.sent()
            self._looking.cancel()

    def stage(self) -> Stage:
        """From its admission to its last byte, or to now."""
        ended = self._ended or time.monotonic()
        return Stage("receive", self._began, ended, ended - self._began)

    async def chunk(self) -> None:
        """Return when a chunk has come, or all."""
        while not self._complete and self._admitted.received_bytes < self._first_bytes:
            await self._more()

    async def pieces(self) -> AsyncGenerator[tuple[bytes, bool]]:
        """What has arrived since the last piece, at most PIECE_BYTES, and whether it is the last.

        Only the last can be empty.
        """
        ended = False
        while not ended:
            if not self._arrived and not self._complete:
                await self._more()
                continue
            piece = bytes(self._arrived.popleft()) if self._arrived else b""
            ended = self._complete and not self._arrived
            if piece or ended:
                yield piece, ended

    async def _more(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _take(self, came: bytes) -> None:
        """Pieces of one size, and no single buffer that grows: that is moved, and leaves holes."""
        self._admitted.count(len(came))
        rest = memoryview(came)
        while rest:
            if not self._arrived or len(self._arrived[-1]) == PIECE_BYTES:
                self._arrived.append(bytearray())
            room = PIECE_BYTES - len(self._arrived[-1])
            self._arrived[-1] += rest[:room]
            rest = rest[room:]

    def _end(self) -> None:
        self._complete = True
        self._looking.cancel()
        self._admitted.sent()
        self._ended = time.monotonic()
        metrics.RECEIVE_SECONDS.observe(self._ended - self._began)

    def _look(self, deadline: asyncio.Timeout) -> None:
        """See how much has come, and end what comes too slowly."""
        received = self._admitted.received_bytes
        self._received.append(received)
        since, last = self._received[0], self._received[-2]
        looked_for_s = (len(self._received) - 1) * self._look_s
        least = max(1, self._min_rate * looked_for_s)
        if len(self._received) == self._received.maxlen and received - since < least:
            _end_now(deadline)
        else:
            self._admitted.comes(slowly=received - last < self._min_rate * self._look_s)
        self._look_again(deadline)

    def _look_again(self, deadline: asyncio.Timeout) -> None:
        loop = asyncio.get_running_loop()
        self._looking = loop.call_later(self._look_s, self._look, deadline)


def _end_now(deadline: asyncio.Timeout) -> None:
    deadline.reschedule(asyncio.get_running_loop().time())
