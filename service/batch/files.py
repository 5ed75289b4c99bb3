"""The files of an archive, wherever fsspec finds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, cast

import fsspec
from fsspec import AbstractFileSystem
from fsspec.core import has_magic, url_to_fs
from msgspec import Struct

Kind: TypeAlias = Literal["jsonl", "csv", "tsv", "parquet", "text"]

COMPRESSED = ".gz", ".zst"

KINDS: Mapping[str, Kind] = {
    ".parquet": "parquet",
    **{
        f".{kind}{end}": kind
        for kind in cast("tuple[Kind, ...]", ("jsonl", "csv", "tsv"))
        for end in ("", *COMPRESSED)
    },
}
"""By the ends of names. Any other file is a text."""

CHANGES = "ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created"
"""What file systems call that which is another once a file has changed, best first."""


class File(Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the input, as it was when the work began."""

    name: str
    """What answers and errors call it: the input as it was given, and the path below it."""

    url: str
    """Where any machine finds it."""

    size: int
    change: str
    """Another once the file has changed."""

    @property
    def kind(self) -> Kind:
        """What it holds, by its name."""
        return next((kind for end, kind in KINDS.items() if self.name.endswith(end)), "text")

    @property
    def compressed(self) -> bool:
        """Whether it is a table that can be read from its beginning alone."""
        return self.kind != "text" and self.name.endswith(COMPRESSED)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Its bytes. Raises OSError."""
        with fsspec.open(self.url, "rb") as opened:
            yield opened


def found(inputs: Iterable[str], out: str) -> list[File]:
    """The files of all inputs: each a file, a folder or a pattern, local or a URL.

    Those of a folder come in the order of their paths, without what is hidden: names that begin
    with a dot or an underscore. Raises ValueError for an input without files, or one that `out`
    lies in, and FileNotFoundError for one that is not there.
    """
    files: dict[str, File] = {}
    target = absolute(out)
    for given in inputs:
        below = [*_files_of(given)]
        if not below:
            raise ValueError(f"{given}: there is no file to read in it")
        files |= {file.url: file for file in below}
    for file in files.values():
        if file.url.startswith(f"{target.rstrip('/')}/"):
            raise ValueError(f"{file.name} lies in {out}: answers can't be among what is read")
    return [*files.values()]


def absolute(place: str) -> str:
    """A path or URL as every process understands it, whichever folder it is in."""
    return place if "://" in place else str(Path(place).absolute())


def system_of(place: str) -> tuple[AbstractFileSystem, str]:
    """The file system of an absolute place, and what that calls it.

    Raises ValueError for a kind of URL that fsspec doesn't know or lacks a package for.
    """
    try:
        system, path = url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error
    return system, path


def _files_of(given: str) -> Iterator[File]:
    place = absolute(given)
    system, path = system_of(place)
    if has_magic(path) and not system.exists(path):
        for each, info in sorted(system.glob(path, detail=True).items()):
            if info["type"] == "file":
                yield _file(system.unstrip_protocol(each) if "://" in place else each, each, info)
        return
    info = system.info(path)
    if info["type"] == "file":
        yield _file(place, given, info)
        return
    root = path.rstrip("/")
    for each, info in sorted(system.find(path, detail=True).items()):
        inner = each[len(root) :].lstrip("/")
        if not any(step.startswith((".", "_")) for step in inner.split("/")):
            yield _file(f"{place.rstrip('/')}/{inner}", f"{given.rstrip('/')}/{inner}", info)


def _file(url: str, name: str, info: Mapping[str, Any]) -> File:
    change = next((str(info[each]) for each in CHANGES if info.get(each) is not None), "")
    return File(readable(name), url, info["size"] or 0, change)


def readable(text: str) -> str:
    """The text with a question mark for each half of a character, which names of files and JSON may
    have and no UTF-8."""
    return text.encode(errors="replace").decode()
