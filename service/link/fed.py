"""What a worker was fed of a document, for another that may have to read it."""

from __future__ import annotations

import logging
from contextlib import suppress
from tempfile import TemporaryFile
from typing import IO

import numpy as np

from gma.service.engine.opening import Tokens

logger = logging.getLogger(__name__)

MEMORY_BYTES = 2**20
"""Of a document's tokens; more of them are in a file without a name, gone with the process."""

MOST_TOKENS = 2**18
"""Of one feed, see `OpenDocument.feed`."""

ITEM = np.dtype(np.int32)


class Fed:
    """The tokens of a document from the first that may be wanted again."""

    def __init__(self, tokens: Tokens, last: bool) -> None:
        self.whole = True
        """All of them are there: a file could be written."""
        self._last: Tokens | None = None
        self._memory = bytearray()
        self._memory_begin = 0  # in tokens, as all positions
        self._file: IO[bytes] | None = None
        self._file_begin = 0
        self.add(tokens, last)

    def add(self, tokens: Tokens, last: bool) -> None:
        """Hold what was fed after all else."""
        if last:
            self._last = tokens  # apart, for they must be fed as the last again
        elif self.whole:
            self._memory += tokens.astype(ITEM).data
            if len(self._memory) > MEMORY_BYTES:
                self._spill()

    def drop(self, position: int) -> None:
        """Hold nothing before this token."""
        if position >= self._memory_begin:
            self._close()
            del self._memory[: (position - self._memory_begin) * ITEM.itemsize]
            self._memory_begin = position

    def after(self, position: int) -> tuple[Tokens, bool] | None:
        """What was fed from this token on, as much as one feed takes, and whether it is the last;
        None if nothing was. Raises LookupError unless all of it is there."""
        if not self.whole:
            raise LookupError("of what was fed some is not held")
        if self._file and position < self._memory_begin:
            self._file.seek((position - self._file_begin) * ITEM.itemsize)
            data = self._file.read(MOST_TOKENS * ITEM.itemsize)
        else:
            begin = (position - self._memory_begin) * ITEM.itemsize
            data = bytes(self._memory[begin : begin + MOST_TOKENS * ITEM.itemsize])
        if data:
            return np.frombuffer(data, ITEM), False
        return None if self._last is None else (self._last, True)

    def forget(self) -> None:
        """Hold nothing any more."""
        self.whole = False
        self._close()
        self._memory.clear()
        self._last = None

    def _spill(self) -> None:
        # Not in a thread: it is a copy, to the page cache.
        try:
            if self._file is None:
                self._file = TemporaryFile()  # noqa: SIM115 (it is closed by `drop` or `forget`)
                self._file_begin = self._memory_begin
            self._file.seek(0, 2)
            self._file.write(self._memory)
            self._file.flush()
        except OSError:
            logger.warning("a document can't be held for another worker", exc_info=True)
            self.forget()
        else:
            self._memory_begin += len(self._memory) // ITEM.itemsize
            self._memory.clear()

    def _close(self) -> None:
        if self._file:
            with suppress(OSError):  # what could not be written is tried once more
                self._file.close()
            self._file = None
