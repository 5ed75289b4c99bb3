"""The files of an archive, wherever fsspec finds them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, NoReturn, TypeAlias, cast

from fsspec import AbstractFileSystem
from fsspec.core import has_magic, url_to_fs
from fsspec.implementations.local import LocalFileSystem
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
        system, path = system_of(self.url)
        with system.open(path, "rb") as opened:
            yield opened


def found(inputs: Iterable[str], out: str) -> list[File]:
    """The files of all inputs: each a file, a folder or a pattern, local or a URL.

    Those of a folder come in the order of their paths, without what is hidden: names that begin
    with a dot or an underscore; what lies in `out` is never read. Raises ValueError for an input
    without files, or none outside `out`, and for a name that is not UTF-8; FileNotFoundError for an
    input that is not there, and OSError for a folder that can't be listed.
    """
    files: dict[str, File] = {}
    target = f"{absolute(out).rstrip('/')}/"
    for given in inputs:
        below = [*_files_of(given)]
        if not below:
            raise ValueError(f"{given}: there is no file to read in it")
        kept = {file.url: file for file in below if not file.url.startswith(target)}
        if not kept:
            raise ValueError(f"{given} lies in {out}: answers can't be among what is read")
        files |= kept
    return [*files.values()]


def absolute(place: str) -> str:
    """A path or URL as every process understands it, whichever folder it is in."""
    return place if "://" in place else os.path.abspath(place)  # noqa: PTH100 (without "..")


def system_of(place: str) -> tuple[AbstractFileSystem, str]:
    """The file system of an absolute place, and what that calls it.

    Raises ValueError for a kind of URL that fsspec doesn't know or lacks a package for.
    """
    if "://" not in place:  # fsspec would cut it at "::"
        return LocalFileSystem(), place
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
            info = system.info(each) if info.get("islink") else info
            if info["type"] == "file":
                yield _file(system.unstrip_protocol(each) if "://" in place else each, each, info)
        return
    info = system.info(path)
    if info["type"] == "file":
        yield _file(place, given, info)
        return
    root = path.rstrip("/")
    local = isinstance(system, LocalFileSystem)
    below = _below(system, root) if local else system.find(path, detail=True)
    for each, info in sorted(below.items()):
        inner = each[len(root) :].lstrip("/")
        if not any(map(_is_hidden, inner.split("/"))):
            yield _file(f"{place.rstrip('/')}/{inner}", f"{given.rstrip('/')}/{inner}", info)


def _below(system: LocalFileSystem, root: str) -> dict[str, dict[str, Any]]:
    """The files of a folder here, and links to files, as `find` tells of those elsewhere.

    That leaves out what can't be listed, follows links to folders into loops, and takes a pipe for
    a file. A link that leads nowhere is one: its row says so. Raises OSError.
    """

    def refuse(error: OSError) -> NoReturn:
        raise error

    found = {}
    for folder, folders, names in os.walk(root or "/", onerror=refuse):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        for path in (f"{folder.rstrip('/')}/{name}" for name in names):
            info = system.info(path) if system.exists(path) else {"type": "file", "size": 0}
            if info["type"] == "file":
                found[path] = info
    return found


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _file(url: str, name: str, info: Mapping[str, Any]) -> File:
    if readable(url) != url:
        raise ValueError(f"{readable(name)}: the name of this file is not UTF-8: rename it")
    change = next((str(info[each]) for each in CHANGES if info.get(each) is not None), "")
    return File(readable(name), url, info["size"] or 0, change)


def readable(text: str) -> str:
    """The text with a question mark for each half of a character, which names of files and JSON may
    have and no UTF-8."""
    return text.encode(errors="replace").decode()
