"""A request's body while it arrives, and the client while it stays."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import NoReturn

from starlette.types import Receive

from gma.service.errors import ServiceError, Stalled
from gma.service.gateway.admission import Admitted
from gma.service.gateway.document import PIECE_BYTES
from gma.service.http.codings import unpacked
from gma.service.observe import metrics
from gma.service.observe.traces import Stage
from gma.service.settings import CPU_GRID, Settings

LOOK_S = 2.0
"""How often it is measured how fast a body comes."""


AHEAD_BYTES = PIECE_BYTES
"""Of a stream that are taken before they are wanted. So a client that has left is heard of, if this
is all that it had left to send."""


class ClientGone(Exception):
    """The client closed the connection: nobody is there to be answered."""


class Pace:
    """Sees to it that a body comes fast enough while it is waited for."""

    def __init__(self, admitted: Admitted, settings: Settings) -> None:
        self._admitted = admitted
        self._min_rate = settings.min_upload_rate
        self._look_s = min(LOOK_S, settings.idle_timeout_s)
        self._looks = max(1, round(settings.idle_timeout_s / self._look_s))
        self._received: deque[int] = deque(maxlen=self._looks + 1)  # bytes, at each look
        self._looking: asyncio.TimerHandle | None = None
        self._deadline: asyncio.Timeout | None = None

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """While the context lasts, raises Stalled in it if the body comes too slowly."""
        try:
            async with asyncio.timeout(None) as self._deadline:
                yield
        except TimeoutError:
            raise Stalled(
                f"the body comes at less than {self._min_rate} bytes a second, or has stopped: "
                "send the document again"
            ) from None
        finally:
            self.rest()
            self._deadline = None

    def wait(self) -> None:
        """The body is waited for from now on, while it is `kept`."""
        if self._deadline and not self._looking:
            self._admitted.sends(give_up=self._end_now)
            self._received.append(self._admitted.received_bytes)
            self._look_again()

    def rest(self) -> None:
        """It is not waited for."""
        if self._looking:
            self._looking.cancel()
            self._looking = None
        self._received.clear()
        self._admitted.sent()

    def _look(self) -> None:
        """See how much has come, and end what comes too slowly."""
        received = self._admitted.received_bytes
        self._received.append(received)
        since, last = self._received[0], self._received[-2]
        looked_for_s = (len(self._received) - 1) * self._look_s
        least = max(1, self._min_rate * looked_for_s)
        if len(self._received) == self._received.maxlen and received - since < least:
            self._end_now()
        else:
            self._admitted.comes(slowly=received - last < self._min_rate * self._look_s)
        self._look_again()

    def _look_again(self) -> None:
        self._looking = asyncio.get_running_loop().call_later(self._look_s, self._look)

    def _end_now(self) -> None:
        if self._deadline:
            self._deadline.reschedule(asyncio.get_running_loop().time())


class Body:
    """One request's body, not compressed, whatever it was.

    `pump` is the only reader of ASGI's `receive`, from the first byte until the client leaves: two
    readers would take each other's messages. It never waits for whoever reads the pieces, because
    the server in front may buffer without bound: only by counting bytes as they come can a limit
    hold.
    """

    def __init__(
        self,
        receive: Receive,
        admitted: Admitted,
        settings: Settings,
        coding: str | None = None,
    ) -> None:
        """`coding`: how it is compressed, if it is."""
        self._receive = receive
        self._admitted = admitted
        self._coding = coding
        self._pace = Pace(admitted, settings)
        self._arrived: deque[bytearray] = deque()  # pieces: full ones, and the last
        self._bytes = 0
        self._complete = False
        self._began = time.monotonic()
        self._ended: float | None = None
        self._news = asyncio.Event()
        # A token is at least a byte: with less there is no chunk for a worker to read.
        self._first_bytes = settings.chunk_tokens or CPU_GRID[1]

    async def pump(self) -> NoReturn:
        """Take what arrives. Raises ClientGone, TooLarge, Overloaded or Undecodable as soon as it
        is so, and Stalled if it comes too slowly."""
        async with self._pace.kept():
            self._pace.wait()
            arriving = self._arriving()
            if self._coding:
                arriving = unpacked(arriving, self._coding)
            async for piece, last in arriving:
                self._take(piece)
                if last:
                    self._end()
                self._news.set()
            while (await self._receive())["type"] != "http.disconnect":
                pass
            raise ClientGone

    def stage(self) -> Stage:
        """From its admission to its last byte, or to now."""
        ended = self._ended or time.monotonic()
        return Stage("receive", self._began, ended, ended - self._began)

    async def chunk(self) -> None:
        """Return when a chunk has come, or all."""
        while not self._complete and self._bytes < self._first_bytes:
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

    async def counted(
        self, pieces: AsyncGenerator[tuple[bytes, bool]]
    ) -> AsyncGenerator[tuple[bytes, bool]]:
        """`pieces` of the text that it turns out to be, which counts in its place if it is more.
        Raises TooLarge and Overloaded."""
        total = 0
        async with aclosing(pieces):
            async for piece, last in pieces:
                total += len(piece)
                self._admitted.hold(total)
                yield piece, last

    async def _arriving(self) -> AsyncGenerator[tuple[bytes, bool]]:
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            came, more = message.get("body", b""), message.get("more_body", False)
            self._admitted.receive(len(came))
            yield came, not more

    async def _more(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _take(self, came: bytes) -> None:
        """Pieces of one size, and no single buffer that grows: that is moved, and leaves holes."""
        self._bytes += len(came)
        self._admitted.hold(self._bytes)
        rest = memoryview(came)
        while rest:
            if not self._arrived or len(self._arrived[-1]) == PIECE_BYTES:
                self._arrived.append(bytearray())
            room = PIECE_BYTES - len(self._arrived[-1])
            self._arrived[-1] += rest[:room]
            rest = rest[room:]

    def _end(self) -> None:
        self._complete = True
        self._pace.rest()
        self._ended = time.monotonic()
        metrics.RECEIVE_SECONDS.observe(self._ended - self._began)


class Stream:
    """One request's body that may never end.

    `pump` is the only reader of ASGI's `receive`, as of a `Body`, but it waits once there is as
    much as `AHEAD_BYTES` that nobody has read.
    """

    def __init__(self, receive: Receive, admitted: Admitted) -> None:
        self._receive = receive
        self._admitted = admitted
        self._arrived: deque[bytes] = deque()
        self._ahead_bytes = 0
        self._complete = False
        self._error: ServiceError | None = None
        self._news, self._taken = asyncio.Event(), asyncio.Event()

    async def pump(self) -> NoReturn:
        """Take what arrives. Raises ClientGone."""
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            if came := message.get("body", b""):
                self._admitted.receive(len(came))
                self._arrived.append(came)
                self._ahead_bytes += len(came)
            self._complete = self._complete or not message.get("more_body", False)
            self._news.set()
            while self._ahead_bytes >= AHEAD_BYTES and not self._complete:
                self._taken.clear()
                await self._taken.wait()

    def end(self, error: ServiceError) -> None:
        """Have whoever reads the pieces get this error in place of what has not been read."""
        self._error = error
        self._news.set()

    async def pieces(self) -> AsyncGenerator[tuple[bytes, bool]]:
        """What has arrived, piece by piece, and whether it is the last, which can be empty. Raises
        the error with which it was ended."""
        ended = False
        while not ended:
            if self._error:
                raise self._error
            if not self._arrived and not self._complete:
                await self._more()
                continue
            piece = self._arrived.popleft() if self._arrived else b""
            self._ahead_bytes -= len(piece)
            self._taken.set()
            ended = self._complete and not self._arrived
            yield piece, ended

    async def _more(self) -> None:
        self._news.clear()
        await self._news.wait()
