"""What a batch is: model, options, files and parts, written before the first part is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeAlias

import msgspec
from msgspec import Struct

from gma.service.batch.files import File

Format: TypeAlias = Literal["parquet", "jsonl"]


class Options(Struct, frozen=True, forbid_unknown_fields=True):
    """What is read of each record, and what is answered."""

    text: str = "text"
    id: str | None = None
    """Field of a record's id; None: the file, and the line or row."""
    keep: tuple[str, ...] = ()
    """Fields that are answered as they are."""
    top_k: int | None = None
    evidence: bool = False
    format: Format = "parquet"
    part_bytes: int = 16 * 2**20
    """About so many bytes are a part."""


class Part(Struct, frozen=True, forbid_unknown_fields=True):
    """What is read and written as a whole: a stretch of one file, or some files of a text each."""

    file: int
    """Index of the file, or of the first."""
    size: int
    """Bytes, about."""
    files: int = 1
    start: int = 0
    """First byte of a table of text, or row group of Parquet."""
    end: int = 0
    """Behind the last."""
    first: int = 1
    """Number of the first line or row in its file."""


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """All that the answers depend on, and how the work is divided."""

    model: str
    fingerprint: str
    """SHA-256 of the checkpoint, or of what was exported of it."""
    options: Options
    files: tuple[File, ...]
    parts: tuple[Part, ...]

    def encoded(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def decoded(cls, data: bytes, where: str) -> Manifest:
        """What `encoded` made. Raises ValueError, which names where it is from, for anything
        else."""
        try:
            return msgspec.json.decode(data, type=cls)
        except msgspec.DecodeError as error:
            raise ValueError(f"{where}: it can't be read: {error}") from None

    def check(self, fingerprint: str, options: Options, files: Sequence[File], out: str) -> None:
        """Raises ValueError, which tells what differs, unless it is of the same model, options and
        files."""
        other = [
            *self._other_model(fingerprint),
            *self._other_options(options),
            *_other_files(self.files, files),
        ]
        if other:
            raise ValueError(
                f"{out} was begun otherwise: {'; '.join(other)}: give the same again, or another "
                "--out"
            )

    def _other_model(self, fingerprint: str) -> Iterator[str]:
        if fingerprint != self.fingerprint:
            yield f"with another model ({self.model}, {self.fingerprint[:12]})"

    def _other_options(self, options: Options) -> Iterator[str]:
        for name in Options.__struct_fields__:
            before, now = getattr(self.options, name), getattr(options, name)
            if before != now:
                yield f"--{name.replace('_', '-')} was {_said(before)} and is {_said(now)}"


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(value) or "not given"
    return {None: "not given", True: "given", False: "not given"}.get(value, str(value))  # type: ignore[call-overload,no-any-return]


def _other_files(before: Iterable[File], now: Iterable[File]) -> Iterator[str]:
    """The first file that is another, and how many more there are."""
    old, new = ({file.url: file for file in files} for files in (before, now))
    changed = [
        f"{file.name} has changed" for url, file in new.items() if old.get(url, file) != file
    ]
    gone = [f"{file.name} is no longer there" for url, file in old.items() if url not in new]
    added = [f"{file.name} was not there" for url, file in new.items() if url not in old]
    found = changed + gone + added
    if found:
        yield found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
