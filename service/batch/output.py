"""Where answers go: a folder with a file for each part, which is there as a whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from fsspec.implementations.local import LocalFileSystem

from gma.model.training.formats.extra import needing
from gma.service.batch.files import absolute, system_of
from gma.service.batch.manifest import Format, Manifest, Options
from gma.service.batch.records import EXTRA

MANIFEST, SUCCESS = "_manifest.json", "_SUCCESS"

STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "memory"}
"""File systems where what is put is seen once all of it is there."""

OWN = ("id", "label", "labels", "scores", "evidence", "bytes", "tokens", "error")
"""Columns of answers, beside those that are kept."""

Answers = Sequence[Mapping[str, Any]]


class Output:
    """The folder of a batch's answers: the manifest, a file for each part, and at last _SUCCESS.

    Several processes may write the same part: it is the same, and the last one stays.
    """

    def __init__(self, place: str) -> None:
        """Raises ValueError for a kind of URL that can't be used here."""
        self.place = place
        self.url = absolute(place)
        """The same wherever it is asked."""
        self._system, path = system_of(self.url)
        self._folder = path.rstrip("/")

    def names(self) -> set[str]:
        """All that is there. Raises OSError."""
        self._system.invalidate_cache()
        try:
            there = self._system.ls(self._folder, detail=False)
        except FileNotFoundError:
            return set()
        return {each.rstrip("/").rpartition("/")[2] for each in there}

    def get(self, name: str) -> bytes:
        """Raises OSError."""
        data: bytes = self._system.cat_file(f"{self._folder}/{name}")
        return data

    def put(self, name: str, data: bytes) -> None:
        """Write a file, which is seen once all of it is there. Raises OSError."""
        target = f"{self._folder}/{name}"
        if self._is_store:
            self._system.pipe_file(target, data)
            return
        self._system.makedirs(self._folder, exist_ok=True)
        new = f"{self._folder}/.{name}.{uuid4().hex}.tmp"
        if isinstance(self._system, LocalFileSystem):
            try:
                with Path(new).open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                Path(new).replace(target)
            except OSError as error:
                Path(new).unlink(missing_ok=True)  # of a full disk
                raise OSError(error.errno, error.strerror, target) from error
        else:
            self._system.pipe_file(new, data)
            self._system.mv(new, target)

    def finish(self) -> None:
        """Say that all parts are there, and remove what runs left that were cut short."""
        for name in self.names():
            if name.endswith(".tmp"):
                self._system.rm_file(f"{self._folder}/{name}")
        self.put(SUCCESS, b"")

    @property
    def _is_store(self) -> bool:
        protocol = self._system.protocol
        return not STORES.isdisjoint({protocol} if isinstance(protocol, str) else protocol)


def part_name(number: int, kind: Format) -> str:
    """The name of a part's file."""
    return f"part-{number:05d}.{kind}"


def left(manifest: Manifest, there: set[str]) -> list[int]:
    """The parts whose files are not there, the largest first: what is long must not be last."""
    kind = manifest.options.format
    numbers = [n for n, _ in enumerate(manifest.parts) if part_name(n, kind) not in there]
    return sorted(numbers, key=lambda number: -manifest.parts[number].size)


def check(options: Options) -> None:
    """Raises ValueError for options that no file of answers can have, and CorpusError without what
    writes them."""
    for name in options.keep:
        if name in OWN:
            raise ValueError(f"--keep {name}: the answers have a column of their own of this name")
    if options.format == "parquet":
        with needing("Parquet", EXTRA):
            import pyarrow as pa  # noqa: F401


def encoded(answers: Answers, options: Options) -> bytes:
    """A part's file."""
    return _jsonl(answers) if options.format == "jsonl" else _parquet(answers, options)


def _jsonl(answers: Answers) -> bytes:
    lines = (json.dumps(answer, ensure_ascii=False, default=str) for answer in answers)
    return "".join(f"{line}\n" for line in lines).encode(errors="replace")


def _parquet(answers: Answers, options: Options) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    text, number, real = pa.string(), pa.int64(), pa.float64()
    scores = pa.list_(
        pa.struct([("label", text), ("score", real), ("logit", real), ("threshold", real)])
    )
    said = [("label", text), ("labels", pa.list_(text)), ("scores", scores)]
    span = pa.struct(
        [("start", number), ("end", number), ("tokens", number), ("weight", real), *said]
    )
    schema = pa.schema(
        [
            ("id", text),
            *((name, text) for name in options.keep),
            *said,
            *([("evidence", pa.list_(span))] if options.evidence else []),
            ("bytes", number),
            ("tokens", number),
            ("error", text),
        ]
    )
    rows = [
        {**answer, **{name: _text(answer[name]) for name in options.keep}} for answer in answers
    ]
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _text(kept: object) -> str | None:
    """A field that is kept, in a column that has one type whatever the fields are."""
    if kept is None or isinstance(kept, str):
        return kept
    written = json.dumps(kept, ensure_ascii=False, default=str)
    return written.encode(errors="replace").decode()
