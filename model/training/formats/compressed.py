"""Lines of files that may be compressed."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard

from gma.model.training.errors import CorpusError

SUFFIXES = ".gz", ".zst"


class Line(NamedTuple):
    """One line of a file, with the end that it has there."""

    data: bytes
    number: int  # from 1
    where: str  # file and number, for errors

    @property
    def text(self) -> str:
        """The line decoded, without a byte order mark. Raises CorpusError if it is not UTF-8."""
        try:
            return self.data.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise CorpusError(f"{self.where}: not UTF-8: {error}") from error


def lines(file: Path) -> Iterator[Line]:
    """Yield a file's lines, decompressed as its name says.

    Raises CorpusError if it is not compressed so.
    """
    with file.open("rb") as raw:
        for number, data in enumerate(decompressed(raw, str(file)), 1):
            yield Line(data, number, f"{file}, line {number}")


def decompressed(raw: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield the lines of an open file, decompressed as its name says.

    Raises CorpusError if it is not compressed so.
    """
    try:
        if name.endswith(".gz"):
            yield from gzip.GzipFile(fileobj=raw)
        elif name.endswith(".zst"):
            stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            yield from io.BufferedReader(stream)
        else:
            yield from raw
    except (zstandard.ZstdError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{name}: {error}") from error
