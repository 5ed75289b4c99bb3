"""How files are cut into parts: the same ones each time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby

from gma.model.training.errors import CorpusError
from gma.service.batch.files import File
from gma.service.batch.manifest import Options, Part
from gma.service.batch.records import (
    check_columns,
    check_fields,
    ends,
    header,
    is_text,
    opened_parquet,
)

AT_ONCE = 16
"""Files that are looked at together: far ones mostly wait."""


def cut(files: Sequence[File], options: Options) -> tuple[Part, ...]:
    """The parts of all files.

    Tables of text are read through once for it, of Parquet the footers. Raises CorpusError for a
    table that has not the columns that the options name, and OSError.
    """
    parts: list[Part] = []
    numbered = [*enumerate(files)]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        tables = [(n, file) for n, file in numbered if file.kind != "text"]
        cuts = (
            threads.map(partial(_of_table, options), *zip(*tables, strict=True)) if tables else ()
        )
        found = dict(zip([n for n, _ in tables], cuts, strict=True))
    for is_table, some in groupby(numbered, lambda each: each[1].kind != "text"):
        if is_table:
            parts += [part for n, _ in some for part in found[n]]
        else:
            parts += _of_texts([*some], options.part_bytes)
    return tuple(parts)


def _of_texts(files: Sequence[tuple[int, File]], most: int) -> Iterator[Part]:
    """Neighbouring text files that are not larger than a part together; or one that is."""
    some: list[int] = []
    size = 0
    for number, file in files:
        if some and size + file.size > most:
            yield Part(some[0], size, files=len(some))
            some, size = [], 0
        some.append(number)
        size += file.size
    if some:
        yield Part(some[0], size, files=len(some))


def _of_table(options: Options, number: int, file: File) -> list[Part]:
    if file.kind == "parquet":
        return _of_parquet(options, number, file)
    if file.kind == "jsonl":
        check_fields(file, options)
    else:
        check_columns(header(file), options, f"{file.name}, line 1")
    if file.compressed:
        # It can't be read from anywhere else than its beginning.
        return [Part(number, file.size, end=file.size)]
    stretches = ends(file)
    start = lines = 0
    if file.kind != "jsonl":
        start, lines = next(stretches)
    return [*_stretches(number, stretches, options.part_bytes, start, lines)]


def _stretches(
    number: int, ends: Iterable[tuple[int, int]], most: int, start: int, lines: int
) -> Iterator[Part]:
    """Records in a row, as many as make a part full."""
    end, seen = start, lines
    for end, seen in ends:
        if end - start >= most:
            yield Part(number, end - start, start=start, end=end, first=lines + 1)
            start, lines = end, seen
    if end > start:
        yield Part(number, end - start, start=start, end=end, first=lines + 1)


def _of_parquet(options: Options, number: int, file: File) -> list[Part]:
    """Row groups in a row, as many as make a part full."""
    parts: list[Part] = []
    with opened_parquet(file) as opened:
        schema, metadata = opened.schema_arrow, opened.metadata
        check_columns(schema.names, options, file.name)
        kind = schema.field(options.text).type
        if not is_text(kind):
            raise CorpusError(f"{file.name}: column {options.text!r} holds {kind}, and no texts")
        start = size = 0
        first = rows = 1
        for group in range(metadata.num_row_groups):
            found = metadata.row_group(group)
            columns = map(found.column, range(found.num_columns))
            size += sum(
                each.total_uncompressed_size
                for each in columns
                if each.path_in_schema == options.text
            )
            rows += found.num_rows
            if size >= options.part_bytes or group == metadata.num_row_groups - 1:
                parts.append(Part(number, size, start=start, end=group + 1, first=first))
                start, size, first = group + 1, 0, rows
    return parts
