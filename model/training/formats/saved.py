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
    """Yield the documents of the columns that count; class labels have their names.

    Raises CorpusError for the first row that is no document, for a folder that can't be read, and
    if ``datasets`` is not installed.
    """
    with needing(f"{folder}: a saved data set"):
        import datasets
    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CorpusError(f"{folder}: {error}") from error
    columns = names.columns([*found.features], str(folder))
    column = columns[-1]
    feature = found.features[column]
    classes = getattr(getattr(feature, "feature", feature), "names", None)
    for number, row in enumerate(found.select_columns([*columns]), 1):
        where = f"{folder}, row {number}"
        if not names.labelled:
            yield LabelledText.of(row, where, names)
            continue
        label = row[column]
        if classes is not None and label is not None:
            called = [_class(x, classes, f"{where}: {column!r}") for x in _listed(label)]
            label = called if isinstance(label, list) else called[0]
        yield LabelledText.of({**row, column: label}, where, names)


def _listed(label: object) -> list[object]:
    return label if isinstance(label, list) else [label]


def _class(label: object, classes: list[str], where: str) -> str:
    if not isinstance(label, int) or not 0 <= label < len(
        classes
    ):  # -1 is what unlabelled ones have
        raise CorpusError(f"{where} is {label}, which names no class")
    return classes[label]
