"""JSON Lines: an object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from gma.model.training.errors import CorpusError
from gma.model.training.formats.compressed import Line, lines
from gma.model.training.labelled import Fields, LabelledText


def read(file: Path, names: Fields) -> Iterator[LabelledText]:
    """Yield the documents of lines like ``{"text": ..., "label": ...}``, or ``"labels": [...]``.

    Blank ones are none. Raises CorpusError for the first line that is not such a document.
    """
    for line in lines(file):
        if line.data.strip():
            yield LabelledText.of(fields_of(line), line.where, names)


def fields_of(line: Line) -> dict[str, object]:
    """Parse one line. Raises CorpusError if it is not UTF-8, or no object."""
    try:
        fields = json.loads(line.text)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{line.where}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CorpusError(f"{line.where}: not an object")
    return fields
