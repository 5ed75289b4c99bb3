"""A document on its way to the service: pieces of bytes, wherever they come from."""

from __future__ import annotations

import asyncio
import io
import os
import stat
import threading
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
)
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

PIECE_BYTES = 256 * 1024
"""How much is read of a file at once."""

AHEAD_BYTES = 1024 * 1024
"""After how many that the connection has yet to take no more are read."""


@runtime_checkable
class Readable(Protocol):
    """A file that is open for reading bytes."""

    def read(self, size: int, /) -> bytes:
        """Return up to so many bytes, none at the end."""


Document = (
    str
    | bytes
    | bytearray
    | memoryview
    | os.PathLike[str]
    | Readable
    | Iterable[bytes]
    | AsyncIterable[bytes]
)
"""What can be sent. A string is a text, and never a path; iterators give UTF-8 cut anywhere."""

OnSent = Callable[[int, int | None], object]
"""Called with the bytes that were sent, and those of the whole document if that is known."""


class Upload:
    """One document, which may have to be sent several times."""

    def __init__(self, document: Document, on_sent: OnSent | None = None) -> None:
        """Raises TypeError for what is no document, and OSError for a file that is not there."""
        self.size: int | None = None
        """Its bytes, if they are known beforehand: what a file has beyond them is not sent."""
        self.error: Exception | None = None
        """What went wrong where the document comes from, or in `on_sent`."""
        self._begun = False
        self._pump: Pump | None = None
        self._on_sent = on_sent
        self._many_times, self._open = self._source(document)

    @property
    def again(self) -> bool:
        """Whether it can be sent from its beginning: an iterator that gave something can't."""
        return self._many_times or not self._begun

    async def pieces(
        self, waits: Callable[[], None], goes_on: Callable[[], None]
    ) -> AsyncIterator[bytes | bytearray | memoryview]:
        """The document from its beginning.

        `waits` is called when its next piece has yet to come, `goes_on` when it has.
        """
        self._begun = True
        self.error = None
        sent = 0
        try:
            waits()
            async for piece in self._open():
                _check(piece)
                goes_on()
                if self.size is not None:
                    piece = piece[: self.size - sent]
                if piece:
                    yield piece
                    sent += len(piece)
                    if self._on_sent:
                        self._on_sent(sent, self.size)
                if sent == self.size:
                    break
                waits()
            if self.size is not None and sent < self.size:
                raise OSError(f"the file had {self.size} bytes, and has {sent} now")
            goes_on()
        except Exception as error:
            self.error = error
            raise
        finally:
            self.stop()

    def stop(self) -> None:
        """Take no more of it."""
        if self._pump:
            self._pump.stop()

    def _pumped(self, pieces: Callable[[], Iterator[bytes]]) -> AsyncIterator[bytes]:
        self._pump = Pump(pieces)
        return self._pump.pieces()

    def _source(
        self, document: Document
    ) -> tuple[bool, Callable[[], AsyncIterator[bytes | memoryview]]]:
        """Whether it can be read many times, and what begins to read it."""
        match document:
            case str():
                return self._source(document.encode())
            case bytes() | bytearray() | memoryview():
                data = memoryview(document).cast("B")
                self.size = len(data)
                return True, partial(_cut, data)
            case os.PathLike():
                file = Path(document)
                found = file.stat()
                regular = stat.S_ISREG(found.st_mode)
                self.size = found.st_size if regular else None
                return regular, partial(self._pumped, partial(_read_file, file))
            case io.TextIOBase():
                raise TypeError("the file is open as text: open it in binary mode")
            case Readable():
                start = _position(document)
                self.size = _left(document)
                return start is not None, partial(self._pumped, partial(_read, document, start))
            case AsyncIterable():
                return not isinstance(document, AsyncIterator), document.__aiter__
            case Iterable():
                return not isinstance(document, Iterator), partial(
                    self._pumped, partial(iter, document)
                )
        raise TypeError(
            "a document is a text, bytes, a path, an open file or an iterator of bytes, not "
            f"{type(document).__name__}"
        )


class Pump:
    """Takes the pieces of a blocking iterator in a thread of its own, and joins those that come
    faster than they are sent.

    The thread is a daemon: one that waits for a terminal, or a pipe, would else keep the process.
    """

    def __init__(self, pieces: Callable[[], Iterator[bytes]]) -> None:
        self._begin = pieces
        self._ahead: list[bytes] = []
        self._ahead_bytes = 0
        self._ended = False
        self._error: Exception | None = None
        self._stopped = False
        self._changed = threading.Condition()  # guards all that is above
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The pieces. Raises what the iterator does."""
        threading.Thread(target=self._run, name="gma-upload", daemon=True).start()
        ended = False
        while not ended:
            await self._news.wait()
            self._news.clear()
            with self._changed:
                pieces, self._ahead, self._ahead_bytes = self._ahead, [], 0
                ended = self._ended
                self._changed.notify()
            if pieces:
                yield b"".join(pieces)
        if self._error:
            raise self._error

    def stop(self) -> None:
        """Take no more pieces than one that is waited for."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _run(self) -> None:
        try:
            for piece in self._begin():
                _check(piece)
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or self._ahead_bytes < AHEAD_BYTES)
                    if self._stopped:
                        break
                    self._ahead.append(piece)
                    self._ahead_bytes += len(piece)
                    first = len(self._ahead) == 1
                if first:
                    self._tell()
        except Exception as error:
            self._error = error
        with self._changed:
            self._ended = True
        self._tell()

    def _tell(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits for it
            self._loop.call_soon_threadsafe(self._news.set)


def _check(piece: object) -> None:
    if not isinstance(piece, bytes | bytearray | memoryview):
        raise TypeError(f"pieces of a document are bytes, not {type(piece).__name__}")


async def _cut(data: memoryview) -> AsyncIterator[memoryview]:
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]


def _read_file(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        yield from _read(opened, None)


def _read(file: Readable, start: int | None) -> Iterator[bytes]:
    if start is not None:
        file.seek(start)  # type: ignore[attr-defined]  # it has told its position
    # What a pipe or a terminal has now, and not only once there is a whole piece.
    read = getattr(file, "read1", file.read)
    yield from iter(lambda: read(PIECE_BYTES), b"")


def _position(file: object) -> int | None:
    """Where an open file is, None if it can't go back there."""
    try:
        return file.tell() if file.seekable() else None  # type: ignore[attr-defined]
    except (AttributeError, OSError):
        return None


def _left(file: object) -> int | None:
    """The bytes to come; None where finding out is not cheap, as in a compressed file."""
    if not isinstance(file, io.FileIO | io.BufferedReader | io.BufferedRandom | io.BytesIO):
        return None
    start = _position(file)
    if start is None:
        return None
    try:
        return file.seek(0, os.SEEK_END) - start
    except ValueError:
        return None
    finally:
        file.seek(start)
