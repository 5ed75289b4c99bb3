"""Compressed bodies, undone while they arrive: of a bomb there is never much more than a piece."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import Protocol

import zstandard

from gma.service.errors import Undecodable
from gma.service.gateway.document import PIECE_BYTES, Pieces

AT_ONCE = 2**14
"""Compressed bytes that are looked at before others have their turn: they may be hundreds of empty
members."""

ZSTD_AT_ONCE = 256
"""Of zstd, whose library does not stop before the end of what it gets: 4 bytes can be 128 KiB."""

ZSTD_WINDOW_BYTES = 2**23
"""The most that a frame may refer back to, and have us keep: as RFC 9659 has it for HTTP."""


class Unpacker(Protocol):
    """What undoes a coding."""

    inside: bool
    """Whether what has come ends within a member or frame."""

    def unpack(self, data: bytes) -> Iterator[bytes]:
        """What is certain with this. Raises zlib.error or zstandard.ZstdError."""


class Gzip:
    """Any number of members."""

    def __init__(self) -> None:
        self.inside = False
        self._member = _member()

    def unpack(self, data: bytes) -> Iterator[bytes]:
        self.inside = self.inside or bool(data)
        more = bool(data)
        while more:
            found = self._member.decompress(data, PIECE_BYTES)
            data = self._member.unconsumed_tail
            more = bool(data) or len(found) == PIECE_BYTES
            if self._member.eof:
                data = self._member.unused_data
                self.inside = more = bool(data)
                self._member = _member()
            yield found


class Zstd:
    """Any number of frames."""

    def __init__(self) -> None:
        self.inside = False
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
        self._frame = self._decompressor.decompressobj()

    def unpack(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), ZSTD_AT_ONCE):
            left = data[start : start + ZSTD_AT_ONCE]
            while left:
                found = self._frame.decompress(left)
                self.inside = not self._frame.eof
                left = b"" if self.inside else self._frame.unused_data
                if not self.inside:
                    self._frame = self._decompressor.decompressobj()
                yield found


CODINGS: Mapping[str, Callable[[], Unpacker]] = {"gzip": Gzip, "x-gzip": Gzip, "zstd": Zstd}


async def unpacked(pieces: Pieces, coding: str) -> AsyncGenerator[tuple[bytes, bool]]:
    """What is compressed in `pieces`, at most PIECE_BYTES at once. Raises Undecodable for what is
    not, or ends too early, and what `pieces` raise."""
    unpacker = CODINGS[coding]()
    async for piece, _ in pieces:
        for start in range(0, len(piece), AT_ONCE):
            found = unpacker.unpack(piece[start : start + AT_ONCE])
            while (some := _next(found, coding)) is not None:
                for at in range(0, len(some), PIECE_BYTES):
                    yield some[at : at + PIECE_BYTES], False
            await asyncio.sleep(0)
    if unpacker.inside:
        raise Undecodable(f"the body ends before its {coding} does: send all of it")
    yield b"", True


def _next(found: Iterator[bytes], coding: str) -> bytes | None:
    try:
        return next(found, None)
    except (zlib.error, zstandard.ZstdError) as error:
        large = "memory" in str(error)
        raise Undecodable(
            f"the body is {coding} with a window of more than {ZSTD_WINDOW_BYTES // 2**20} MiB: "
            "compress it without --long or --ultra"
            if large
            else f"the body is not {coding}, or damaged"
        ) from None


def _member() -> zlib._Decompress:
    return zlib.decompressobj(wbits=31)
