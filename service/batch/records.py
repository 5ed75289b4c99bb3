"""Records: the lines and rows of tables and whole text files, each with one document."""

from __future__ import annotations

import csv
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from gma.model.training.errors import CorpusError
from gma.model.training.formats.compressed import Line, decompressed
from gma.model.training.formats.extra import needing
from gma.model.training.formats.jsonl import fields_of
from gma.model.training.formats.table import LONGEST_CELL
from gma.model.training.labelled import Fields, text_of
from gma.service.batch.files import File, readable
from gma.service.batch.manifest import Manifest, Options, Part

EXTRA = "batch"

ROWS = 64
"""Of a Parquet file, in memory at a time."""

LOOKED_AT = 100
"""Lines of a file that are asked whether they have the fields."""

PIECE_BYTES = 64 * 1024

DELIMITERS = {"csv": ",", "tsv": "\t"}

Cells: TypeAlias = list[str]
"""Of a row, with a character for each byte."""


class Record(NamedTuple):
    """One line, row or file of the input."""

    id: str
    where: str
    """File, and line or row, for errors."""
    text: bytes | File
    """UTF-8, or the file that is it."""
    kept: Mapping[str, object]
    error: str | None = None
    """Why there is no text to read, if it is so."""

    @property
    def pieces(self) -> Iterator[bytes]:
        """The text, cut anywhere. Raises OSError."""
        if isinstance(self.text, bytes):
            for start in range(0, len(self.text), PIECE_BYTES):
                yield self.text[start : start + PIECE_BYTES]
        else:
            with self.text.open() as opened:
                yield from iter(lambda: opened.read(PIECE_BYTES), b"")


def records(manifest: Manifest, part: Part) -> Iterator[Record]:
    """Yield the records of a part, those that can't be read too.

    Raises OSError, and ValueError for a file that has changed so that it can't be divided as it
    was.
    """
    options = manifest.options
    if manifest.files[part.file].kind == "text":
        for file in manifest.files[part.file : part.file + part.files]:
            yield Record(file.name, file.name, file, dict.fromkeys(options.keep))
        return
    file = manifest.files[part.file]
    read = {"jsonl": _of_lines, "parquet": _of_parquet}.get(file.kind, _of_table)
    yield from read(file, part, options)


def check_columns(there: Sequence[str], options: Options, where: str) -> None:
    """Raises CorpusError unless a table has the columns that the options name, once each."""
    for name in (options.text, *filter(None, [options.id]), *options.keep):
        Fields(name, label="", labels="").columns(there, where)


def check_fields(file: File, options: Options) -> None:
    """Raises CorpusError for JSON Lines of which none of the first has the text, as when its field
    is called otherwise."""
    seen: list[str] = []
    for number, data in zip(range(1, LOOKED_AT + 1), _raw_lines(file), strict=False):
        try:
            fields = fields_of(Line(data, number, f"{file.name}, line {number}"))
        except CorpusError:
            continue
        if options.text in fields:
            return
        seen = seen or [*fields]
    if seen:
        raise CorpusError(
            f"{file.name}: no line has a field {options.text!r}, of the first {LOOKED_AT} at most: "
            f"they have {', '.join(seen)}. --text names the one to read"
        )


def _raw_lines(file: File) -> Iterator[bytes]:
    with file.open() as opened, _broken_off():
        yield from decompressed(opened, file.name)


@contextmanager
def _broken_off() -> Iterator[None]:
    """What ends within is told when it is read."""
    try:
        yield
    except CorpusError:
        return


# Where each record ends, for those who cut files.


def ends(file: File) -> Iterator[tuple[int, int]]:
    """Yield the bytes and the lines of a table of text up to the end of each record, the header of
    a table of cells being the first."""
    with file.open() as opened:
        if file.kind == "jsonl":
            size = 0
            for number, data in enumerate(opened, 1):
                size += len(data)
                yield size, number
        else:
            for row in _rows(opened, DELIMITERS[file.kind]):
                yield row.size, row.lines


# JSON Lines.


def _of_lines(file: File, part: Part, options: Options) -> Iterator[Record]:
    number = part.first
    try:
        for number, data in enumerate(_stretch(file, part), part.first):
            if data.strip():
                line = Line(data, number, f"{file.name}, line {number}")
                yield _record(
                    f"{file.name}:{number}", line.where, options, partial(fields_of, line)
                )
    except CorpusError as error:  # compressed data that breaks off
        where = f"{file.name}, line {number + 1}"
        yield _unread(f"{file.name}:{number + 1}", where, options, error)


def _stretch(file: File, part: Part) -> Iterator[bytes]:
    """The lines of a part."""
    with file.open() as opened:
        if file.compressed:
            yield from decompressed(opened, file.name)
            return
        opened.seek(part.start)
        left = part.end - part.start
        while left > 0 and (line := opened.readline()):
            left -= len(line)
            yield line


# Tables of cells.


class Row(NamedTuple):
    """One row of a table of cells."""

    cells: Cells | csv.Error
    began: int
    """Lines before it."""
    lines: int
    """Up to its end."""
    size: int
    """Bytes up to its end."""


def _rows(lines: Iterable[bytes], delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_CELL)
    size = count = began = 0

    def fed() -> Iterator[str]:
        nonlocal size, count
        for data in lines:
            size += len(data)
            count += 1
            # A character a byte: what is not UTF-8 fails in its own row, not in its file.
            yield data.decode("latin-1")

    reader = csv.reader(fed(), delimiter=delimiter, strict=True)
    while True:
        cells: Cells | csv.Error
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells = error
        yield Row(cells, began, count, size)
        began = count


def header(file: File) -> list[str]:
    """The columns of a table of cells. Raises CorpusError if there is no such row, and OSError."""
    with file.open() as opened:
        return _header(_rows(decompressed(opened, file.name), DELIMITERS[file.kind]), file)


def _header(rows: Iterator[Row], file: File) -> list[str]:
    first = next(rows, None)
    where = f"{file.name}, line 1"
    if first is None or isinstance(first.cells, csv.Error) or not first.cells:
        raise CorpusError(f"{where}: the names of the columns are expected there")
    mark = BOM_UTF8.decode("latin-1")
    cells = [first.cells[0].removeprefix(mark), *first.cells[1:]]
    return [_decoded(cell, where) for cell in cells]


def _of_table(file: File, part: Part, options: Options) -> Iterator[Record]:
    began = 0
    try:
        rows = _rows(_stretch(file, part), DELIMITERS[file.kind])
        columns = _header(rows, file) if file.compressed else header(file)
        for row in rows:
            began = part.first + row.began
            if row.cells == []:
                continue
            where = f"{file.name}, line {began}"
            yield _record(
                f"{file.name}:{began}", where, options, _fields(row.cells, columns, where)
            )
    except CorpusError as error:  # compressed data that breaks off
        where = f"{file.name}, line {began + 1}"
        yield _unread(f"{file.name}:{began + 1}", where, options, error)


def _fields(
    cells: Cells | csv.Error, columns: list[str], where: str
) -> Callable[[], Mapping[str, object]]:
    def parsed() -> Mapping[str, object]:
        if isinstance(cells, csv.Error):
            raise CorpusError(f"{where}: {cells}")
        if len(cells) != len(columns):
            raise CorpusError(
                f"{where}: {len(cells)} cells, where the first row has {len(columns)}"
            )
        return {name: cell.encode("latin-1") for name, cell in zip(columns, cells, strict=True)}

    return parsed


# Parquet.


@contextmanager
def opened_parquet(file: File) -> Iterator[Any]:
    """A Parquet file, open. Raises CorpusError for what is none, and without pyarrow."""
    with needing(f"{file.name}: Parquet", EXTRA):
        from pyarrow import ArrowException, parquet
    try:
        with file.open() as raw, parquet.ParquetFile(raw) as opened:
            yield opened
    except ArrowException as error:
        raise CorpusError(f"{file.name}: {error}") from error


def is_text(kind: Any) -> bool:
    """Whether a type of Arrow's holds texts."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return is_text(kind.value_type)
    known = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(is_kind(kind) for is_kind in known)


def _of_parquet(file: File, part: Part, options: Options) -> Iterator[Record]:
    wanted = [*dict.fromkeys((options.text, *filter(None, [options.id]), *options.keep))]
    groups = range(part.start, part.end)
    with opened_parquet(file) as opened:
        number = part.first
        for batch in opened.iter_batches(ROWS, row_groups=[*groups], columns=wanted):
            columns = {name: _values(batch.column(name)) for name in wanted}
            for row in zip(*columns.values(), strict=True):
                where = f"{file.name}, row {number}"
                fields = partial(dict[str, object], zip(columns, row, strict=True))
                yield _record(f"{file.name}:{number}", where, options, fields)
                number += 1


def _values(column: Any) -> list[object]:
    """The values of a column; those that are texts as bytes, for one that is not UTF-8 would spoil
    all."""
    import pyarrow as pa

    if not is_text(column.type):
        values: list[object] = column.to_pylist()
        return values
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    texts: list[object] = column.cast(pa.large_binary()).to_pylist()
    return texts


# One record.


def _record(
    place: str, where: str, options: Options, parsed: Callable[[], Mapping[str, object]]
) -> Record:
    """The record of some fields, whose texts may still be bytes."""
    kept: dict[str, object] = dict.fromkeys(options.keep)
    name = place
    try:
        fields = parsed()
        kept = {each: _kept(fields.get(each)) for each in options.keep}
        if options.id is not None:
            name = _id(fields.get(options.id), where, options.id)
        text = fields.get(options.text)
        if isinstance(text, bytes):
            fields = {**fields, options.text: _decoded(text, f"{where}: {options.text!r}")}
        text = text_of(fields, where, options.text)
    except CorpusError as error:
        return Record(name, where, b"", kept, readable(str(error)))
    return Record(name, where, text.encode(), kept)


def _unread(place: str, where: str, options: Options, error: CorpusError) -> Record:
    """What stands for the rest of a file."""
    why = readable(f"{where}: the file can't be read further: {error.__cause__ or error}")
    return Record(place, where, b"", dict.fromkeys(options.keep), why)


def _id(value: object, where: str, name: str) -> str:
    if isinstance(value, bytes):
        value = _decoded(value, f"{where}: {name!r}")
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise CorpusError(f"{where}: {name!r} is missing, or neither a string nor an integer")
    return readable(str(value))


def _kept(value: object) -> object:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return readable(value) if isinstance(value, str) else value


def _decoded(text: bytes | str, where: str) -> str:
    data = text.encode("latin-1") if isinstance(text, str) else text
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where}: not UTF-8: {error}") from error
