"""Which files are a data folder's splits, and what they hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from gma.model.training.errors import CorpusError
from gma.model.training.formats import folders, jsonl, parquet, saved, table
from gma.model.training.formats.compressed import SUFFIXES
from gma.model.training.labelled import TEXT_AND_LABEL, Fields, LabelledText

TRAIN, VALID, TEST = "train", "valid", "test"
VALIDATION = "validation"
"""What others call valid."""

OTHERS = VALID, VALIDATION, TEST
"""Where one of these is, the folder's folders are no labels."""

Reader = Callable[[Path, Fields], Iterator[LabelledText]]

READERS: dict[str, Reader] = {
    ".jsonl": jsonl.read,
    ".csv": table.read_csv,
    ".tsv": table.read_tsv,
    ".parquet": parquet.read,
}
"""How a file is read, by the end of its name; tables of text may be compressed too."""

DRAWN = 10
"""One in so many of each label's texts is drawn for valid, where there is no such split."""

ALIKE = (*READERS, ".json", ".ndjson")
"""Ends of the names of files that somebody may have meant for a split."""


class Source(NamedTuple):
    """A file or folder of documents, and what reads it."""

    path: Path
    reader: Reader
    names: Fields

    def read(self) -> Iterator[LabelledText]:
        """Yield its documents. Raises CorpusError for the first one that is none."""
        return self.reader(self.path, self.names)


class Splits:
    """The splits of a data folder: ``train``, ``valid``, ``test`` and any other.

    A split NAME is the files ``NAME.jsonl`` and ``NAME-0.jsonl``, ``NAME-1.jsonl``, ... in the
    order of their names, or such of ``.csv``, ``.tsv`` (each also ``.gz`` or ``.zst``) or
    ``.parquet``; or a folder NAME that ``datasets`` saved, or that has a folder for each label.
    ``validation`` is ``valid`` too. A file, a saved data set or a folder of labels that stands for
    all data is the train split. Where there is no valid split, one is drawn from train by the
    texts' digests: the same from the same texts, whatever their order. All documents have a
    label, or all have a list of labels. Where labels do not count, a folder of ``.txt`` files is
    a split too.
    """

    def __init__(self, data: Path, names: Fields = TEXT_AND_LABEL) -> None:
        """``names`` are those of the fields that count; a folder for each label has none.

        Raises CorpusError if there is nothing of that name.
        """
        if not data.exists():
            raise CorpusError(f"{data}: there is no such file or folder")
        self.data, self.names = data, names
        self._multi_label: bool | None = None

    def has(self, split: str) -> bool:
        """Say whether there are files of this split."""
        return bool(self._found(split))

    def sources(self, split: str) -> list[Source]:
        """Find what the split consists of; none if it is to be drawn.

        Raises CorpusError if there is nothing of it, or if it is there twice.
        """
        found = self._found(split)
        if not found and not (split == VALID and self.has(TRAIN)):
            unread = ", ".join(path.name for path in self.passed_over(split))
            raise CorpusError(
                f"{self.data} holds no {split} split: no {split}.jsonl, .csv, .tsv or .parquet, no "
                f"{split}-0.jsonl and so on, no folder {split}"
                + (f"; {unread} is not named so" if unread else "")
            )
        ends = {_parts(source.path)[1] for source in found}
        stems = [_parts(source.path)[0] for source in found]
        if len(ends) > 1 or len(set(stems)) < len(stems):
            names = ", ".join(source.path.name for source in found)
            raise CorpusError(f"{self.data} holds the {split} split more than once: {names}")
        return found

    def passed_over(self, split: str) -> list[Path]:
        """Find the files whose names begin as the split's do, but that are not its."""
        if not self.data.is_dir():
            return []
        read = {source.path for source in self._found(split)}
        return [
            path
            for path in sorted(self.data.iterdir())
            if path.name.lower().startswith(split) and path not in read and _parts(path)[1] in ALIKE
        ]

    def read(self, split: str) -> Iterator[LabelledText]:
        """Yield the split's documents.

        Raises CorpusError for the first one that is none, and if there are none at all.
        """
        empty = True
        for document in self._read(split):
            yield document
            empty = False
        if empty:
            raise CorpusError(f"{self.data}: the {split} split has no documents")

    def _read(self, split: str) -> Iterator[LabelledText]:
        sources = self.sources(split)
        if split not in (TRAIN, VALID) or self.has(VALID):
            yield from self._documents(sources)
            return
        for document in self._documents(self.sources(TRAIN)):
            if (document.digest in self._drawn) == (split == VALID):
                yield document

    @cached_property
    def _drawn(self) -> frozenset[bytes]:
        """The digests of the texts that are valid's, though they stand in train's files."""
        by_label: dict[str | None, set[bytes]] = {}
        for document in self._documents(self.sources(TRAIN)):
            for label in document.labels or (None,):  # those without any are drawn alike
                by_label.setdefault(label, set()).add(document.digest)
        drawn = frozenset(
            digest
            for found in by_label.values()
            for digest in sorted(found)[: -(-len(found) // DRAWN) if len(found) > 1 else 0]
        )
        if by_label and not drawn:
            few = "no label has two texts" if self.names.labelled else "it has one text alone"
            raise CorpusError(f"{self.data}: {few}, so no valid split can be drawn from train")
        return drawn

    def _documents(self, sources: list[Source]) -> Iterator[LabelledText]:
        """Yield documents. Raises CorpusError for the first of another kind than the others."""
        for source in sources:
            for document in source.read():
                if self._multi_label is None:
                    self._multi_label = document.multi_label
                if document.multi_label != self._multi_label:
                    kinds = "a label, where others have a list of labels"
                    if document.multi_label:
                        kinds = "a list of labels, where others have one label"
                    raise CorpusError(f"{document.where}: {kinds}")
                yield document

    def _found(self, split: str) -> list[Source]:
        if not self.data.is_dir():
            reader = READERS.get(_parts(self.data)[1])
            if reader is None:
                raise CorpusError(f"{self.data}: data is a folder, or {', '.join(READERS)}")
            return [Source(self.data, reader, self.names)] if split == TRAIN else []
        names = (split, VALIDATION) if split == VALID else (split,)
        found = [source for name in names for source in self._named(name)]
        if not found and split == TRAIN and not any(map(self._named, OTHERS)):
            found = self._folder(self.data)
        return found

    def _named(self, name: str) -> list[Source]:
        whole = self._folder(self.data / name) if (self.data / name).is_dir() else []
        shard = re.compile(rf"{re.escape(name)}(-\d+(-of-\d+)?)?")
        return whole + [
            Source(path, READERS[end], self.names)
            for path in sorted(self.data.iterdir())
            for stem, end, _ in [_parts(path)]
            if end in READERS and shard.fullmatch(stem) and path.is_file()
        ]

    def _folder(self, folder: Path) -> list[Source]:
        """What a folder is that holds a whole split."""
        if (folder / saved.MARK).is_file():
            return [Source(folder, saved.read, self.names)]
        if not self.names.labelled:
            alone = folders.texts(folder)
            return [Source(folder, folders.read_alone, self.names)] if alone else []
        labels = folders.labels(folder)
        return [Source(folder, folders.read, self.names)] if labels else []


def _parts(path: Path) -> tuple[str, str, str]:
    """Stem, end and compression of a name: ``train-0``, ``.jsonl``, ``.zst``."""
    packed = path.suffix if path.suffix in SUFFIXES else ""
    name = path.name.removesuffix(packed)
    end = Path(name).suffix
    return name.removesuffix(end), end, packed
