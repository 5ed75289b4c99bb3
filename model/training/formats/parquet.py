"""Parquet files; they need pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gma.model.training.errors import CorpusError
from gma.model.training.formats.extra import needing
from gma.model.training.labelled import Fields, LabelledText

BATCH = 64
"""Rows in memory at a time."""


def read(file: Path, names: Fields) -> Iterator[LabelledText]:
    """Yield the documents of the columns that count; that of labels has lists.

    Raises CorpusError for the first row that is no document, and if pyarrow is not installed.
    """
    with needing(f"{file}: Parquet"):
        from pyarrow import ArrowException, parquet
    try:
        with parquet.ParquetFile(file) as opened:
            columns = names.columns(opened.schema_arrow.names, str(file))
            number = 0
            for batch in opened.iter_batches(BATCH, columns=[*columns]):
                for row in batch.to_pylist():
                    number += 1
                    yield LabelledText.of(row, f"{file}, row {number}", names)
    except ArrowException as error:
        raise CorpusError(f"{file}: {error}") from error
