"""A folder per label, a text file per document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gma.model.training.errors import CorpusError
from gma.model.training.labelled import Fields, LabelledText


def read(folder: Path, names: Fields) -> Iterator[LabelledText]:
    """Yield the documents ``LABEL/FILE``, also deeper in, in the order of their paths.

    What a hidden file or folder holds is passed over. Raises CorpusError for the first file that is
    blank, or not UTF-8.
    """
    for label in labels(folder):
        for file in sorted(label.rglob("*")):
            if file.is_file() and not _hidden(file.relative_to(label)):
                try:
                    text = file.read_bytes().decode()
                except UnicodeDecodeError as error:
                    raise CorpusError(f"{file}: not UTF-8: {error}") from error
                yield LabelledText.of({names.text: text, names.label: label.name}, str(file), names)


def labels(folder: Path) -> list[Path]:
    """Return the folders of labels, in the order of their names."""
    return sorted(x for x in folder.iterdir() if x.is_dir() and not _hidden(Path(x.name)))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
