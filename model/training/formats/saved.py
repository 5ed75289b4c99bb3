"""What ``save_to_disk`` of Hugging Face's ``datasets`` wrote; it needs that package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gma.model.training.errors import CorpusError
from gma.model.training.formats.extra import needing
from gma.model.training.labelled import Fields, LabelledText

MARK = "state.json"
"""File that each saved data set has."""


def read(folder: Path, names: Fields) -> Iterator[LabelledText]:
    """Yield the documents of two columns; a class label has its name.

    Raises CorpusError for the first row that is no document, for a folder that can't be read, and
    if ``datasets`` is not installed.
    """
    with needing(f"{folder}: a saved data set"):
        import datasets
    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CorpusError(f"{folder}: {error}") from error
    features = found.features
    for name in names:
        if name not in features:
            raise CorpusError(
                f"{folder}: no column is named {name!r}: they are {', '.join(features)}"
            )
    classes = getattr(features[names.label], "names", None)
    for number, row in enumerate(found.select_columns([*names]), 1):
        where = f"{folder}, row {number}"
        label = row[names.label]
        if classes is not None and label is not None:
            if not 0 <= label < len(classes):  # -1 is what unlabelled ones have
                raise CorpusError(f"{where}: {names.label!r} is {label}, which names no class")
            label = classes[label]
        yield LabelledText.of({**row, names.label: label}, where, names)
