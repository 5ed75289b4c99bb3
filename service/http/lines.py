"""The lines of a body, one after the other, while it arrives."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator

from gma.service.gateway.document import PIECE_BYTES, Pieces

_SPACE = re.compile(rb"[ \t\r\n]*+")


class Lines:
    """Cuts a body at its line breaks. Lines of nothing but space are passed over, and counted.

    Nothing of a line is kept here, however long it is. Whoever waits for more of one may be
    cancelled, and the next go on from there.
    """

    def __init__(self, pieces: Pieces) -> None:
        self.number = 1
        """Of the line that is read, or comes next."""
        self._pieces = pieces
        self._coming: asyncio.Task[tuple[bytes, bool]] | None = None
        self._held = b""
        self._at = 0
        self._ended = False
        self._inside = False

    async def next(self) -> bool:
        """Go to the next line, past what was not read of this one; False if there is none.

        Raises what the body does, and then again.
        """
        while self._inside:
            async for _ in self.pieces():
                await asyncio.sleep(0)  # all of it may have come
        while True:
            space = _SPACE.match(self._held, self._at)
            begin = space.end() if space else self._at
            self.number += self._held.count(b"\n", self._at, begin)
            self._at = begin
            self._inside = begin < len(self._held)
            if self._inside or self._ended:
                return self._inside
            await self._more()

    async def pieces(self) -> AsyncGenerator[tuple[bytes, bool]]:
        """What is left of this line, in pieces of at most PIECE_BYTES, and whether it is the last.
        Raises what the body does."""
        while self._inside:
            limit = self._at + PIECE_BYTES
            end = self._held.find(b"\n", self._at, limit)
            if end >= 0:
                piece, self._at = self._held[self._at : end], end + 1
                self._inside = False
                self.number += 1
                yield piece, True
            elif self._at < len(self._held) or self._ended:
                piece, self._at = self._held[self._at : limit], min(limit, len(self._held))
                self._inside = self._at < len(self._held) or not self._ended
                yield piece, not self._inside
            else:
                await self._more()

    def close(self) -> None:
        """Wait for nothing more."""
        if self._coming:
            self._coming.cancel()

    async def _more(self) -> None:
        if not self._coming:
            self._coming = asyncio.ensure_future(self._next())
        self._held, self._ended = await asyncio.shield(self._coming)
        self._at, self._coming = 0, None

    async def _next(self) -> tuple[bytes, bool]:
        return await anext(self._pieces)
