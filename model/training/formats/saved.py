"""What ``save_to_disk`` of Hugging Face's ``datasets`` wrote; it needs that package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gma.model.training.errors import CorpusError
from gma.model.training.formats.extra import needing
from gma.model.training.labelled import LabelledText

MARK = "state.json"
"""File that each saved data set has."""


def read(folder: Path) -> Iterator[LabelledText]:
    """Yield the documents of the columns ``text`` and ``label``; a class label has its name.

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
    for name in ("text", "label"):
        if name not in features:
            raise CorpusError(
                f"{folder}: no column is named {name!r}: they are {', '.join(features)}"
            )
    names = getattr(features["label"], "names", None)
    for number, row in enumerate(found.select_columns(["text", "label"]), 1):
        where = f"{folder}, row {number}"
        label = row["label"]
        if names is not None and label is not None:
            if not 0 <= label < len(names):  # -1 is what unlabelled ones have
                raise CorpusError(f"{where}: 'label' is {label}, which is none of {len(names)}")
            label = names[label]
        yield LabelledText.of({"text": row["text"], "label": label}, where)
