"""Tables as text: CSV, and TSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from gma.model.training.errors import CorpusError
from gma.model.training.formats.compressed import lines
from gma.model.training.labelled import Fields, LabelledText

BETWEEN = "|"
"""Stands between the labels of a cell that may have several."""

LONGEST_CELL = (1 << 31) - 1
"""Characters; the csv module's own limit is 128 Ki."""


def read_csv(file: Path, names: Fields) -> Iterator[LabelledText]:
    """Yield the documents of a comma-separated table whose first row names its columns.

    A cell of labels is like ``sea|farm``; an empty one has none. Raises
    CorpusError for the first row that is no document, and names the line that it begins at.
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
                names.columns(header, where)
            elif row:
                if len(row) != len(header):
                    raise CorpusError(
                        f"{where}: {len(row)} cells, where the first row has {len(header)}"
                    )
                fields: dict[str, object] = dict(zip(header, row, strict=True))
                if names.labelled and names.labels in fields:
                    fields[names.labels] = _labels(str(fields[names.labels]))
                yield LabelledText.of(fields, where, names)
    except csv.Error as error:
        raise CorpusError(f"{file}, line {began}: {error}") from error


def _labels(cell: str) -> list[str]:
    return [label.strip() for label in cell.split(BETWEEN)] if cell.strip() else []
