"""A folder of text files, one per document: a folder per label, or one of texts alone."""

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
        for file in _files(label):
            fields = {names.text: _text(file), names.label: label.name}
            yield LabelledText.of(fields, str(file), names)


def read_alone(folder: Path, names: Fields) -> Iterator[LabelledText]:
    """Yield the documents of ``texts``, without labels.

    Raises CorpusError as ``read`` does.
    """
    for file in texts(folder):
        yield LabelledText.of({names.text: _text(file)}, str(file), names)


def texts(folder: Path) -> list[Path]:
    """Return the files in a folder's folders, and its own ``.txt``, in the order of their paths."""
    return [file for file in _files(folder) if file.suffix == ".txt" or file.parent != folder]


def labels(folder: Path) -> list[Path]:
    """Return the folders of labels, in the order of their names."""
    return sorted(x for x in folder.iterdir() if x.is_dir() and not _hidden(Path(x.name)))


def _files(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*"))
    return [file for file in found if file.is_file() and not _hidden(file.relative_to(folder))]


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file}: not UTF-8: {error}") from error


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
