"""Lines of files that may be compressed."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import zstandard

from gma.model.training.errors import CorpusError

SUFFIXES = ".gz", ".zst"


class Line(NamedTuple):
    """One line of a file, with the end that it has there."""

    text: str
    number: int  # from 1
    where: str  # file and number, for errors


def lines(file: Path) -> Iterator[Line]:
    """Yield a file's lines as text, decompressed as its name says.

    Raises CorpusError if it is not compressed so, and for a line that is not UTF-8.
    """
    for number, line in enumerate(_raw(file), 1):
        where = f"{file}, line {number}"
        try:
            yield Line(line.decode("utf-8-sig" if number == 1 else "utf-8"), number, where)
        except UnicodeDecodeError as error:
            raise CorpusError(f"{where}: not UTF-8: {error}") from error


def _raw(file: Path) -> Iterator[bytes]:
    with file.open("rb") as raw:
        try:
            if file.suffix == ".gz":
                yield from gzip.GzipFile(fileobj=raw)
            elif file.suffix == ".zst":
                stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                yield from io.BufferedReader(stream)
            else:
                yield from raw
        except (zstandard.ZstdError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise CorpusError(f"{file}: {error}") from error
