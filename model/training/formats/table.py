"""Tables as text: CSV, and TSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from gma.model.training.errors import CorpusError
from gma.model.training.formats.compressed import lines
from gma.model.training.labelled import Fields, LabelledText

LONGEST_CELL = (1 << 31) - 1
"""Characters; the csv module's own limit is 128 Ki."""


def read_csv(file: Path, names: Fields) -> Iterator[LabelledText]:
    """Yield the documents of a comma-separated table whose first row names its columns.

    Raises CorpusError for the first row that is no document, and names the line that it begins at.
    """
    return _read(file, names, ",")


def read_tsv(file: Path, names: Fields) -> Iterator[LabelledText]:
    """Do as ``read_csv``, with tabs; a cell that begins with a quote ends with one."""
    return _read(file, names, "\t")


def _read(file: Path, names: Fields, delimiter: str) -> Iterator[LabelledText]:
    csv.field_size_limit(LONGEST_CELL)
    rows = csv.reader((line.text for line in lines(file)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    began = 1
    try:
        for row in rows:
            where = f"{file}, line {began}"
            began = rows.line_num + 1
            if header is None:
                header = row
                _check_header(header, names, where)
            elif row:
                if len(row) != len(header):
                    raise CorpusError(
                        f"{where}: {len(row)} cells, where the first row has {len(header)}"
                    )
                yield LabelledText.of(dict(zip(header, row, strict=True)), where, names)
    except csv.Error as error:
        raise CorpusError(f"{file}, line {began}: {error}") from error


def _check_header(header: list[str], names: Fields, where: str) -> None:
    for name in names:
        if header.count(name) != 1:
            many = "two columns are" if name in header else "no column is"
            raise CorpusError(f"{where}: {many} named {name!r}: they are {', '.join(header)}")
