"""The lines of a body, one after the other, while it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from gma.service.gateway.document import PIECE_BYTES, Pieces

SPACE = b" \t\r\n"


class Lines:
    """Cuts a body at its line breaks. Lines of nothing but space are passed over, and counted.

    Nothing of a line is kept here, however long it is.
    """

    def __init__(self, pieces: Pieces) -> None:
        self.number = 1
        """Of the line that is read, or comes next."""
        self._pieces = pieces
        self._held = b""
        self._ended = False
        self._inside = False
        self._error: Exception | None = None

    async def next(self) -> bool:
        """Go to the next line, past what was not read of this one; False if there is none.

        Raises what the body does.
        """
        while self._inside:
            async for _ in self.pieces():
                await asyncio.sleep(0)  # all of it may have come
        while True:
            begin = len(self._held) - len(self._held.lstrip(SPACE))
            self.number += self._held.count(b"\n", 0, begin)
            self._held = self._held[begin:]
            if self._held or self._ended:
                self._inside = bool(self._held)
                return self._inside
            await self._more()

    async def pieces(self) -> AsyncGenerator[tuple[bytes, bool]]:
        """What is left of this line, and whether it is the last of it."""
        while self._inside:
            end = self._held.find(b"\n", 0, PIECE_BYTES)
            if end >= 0:
                piece, self._held = self._held[:end], self._held[end + 1 :]
                self._inside = False
                self.number += 1
                yield piece, True
            elif self._held:
                piece, self._held = self._held[:PIECE_BYTES], self._held[PIECE_BYTES:]
                self._inside = bool(self._held) or not self._ended
                yield piece, not self._inside
            elif self._ended:
                self._inside = False
                yield b"", True
            else:
                await self._more()

    async def _more(self) -> None:
        if self._error:
            raise self._error
        try:
            self._held, self._ended = await anext(self._pieces)
        except Exception as error:
            self._error = error
            raise
