"""What a look at all documents shows before any training: labels, and what is wrong with splits."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.progress import Progress

from gma.model.training.errors import CorpusError, TrainingError
from gma.model.training.labelled import Label, LabelledText
from gma.model.training.splits import TEST, TRAIN, VALID, Splits


@dataclass
class Found:
    """How often something was found, and an example."""

    count: int = 0
    example: str = ""

    def add(self, example: str) -> None:
        """Count one more; the first is the example."""
        self.example = self.example or example
        self.count += 1


@dataclass
class Surveyed:
    """What one split holds."""

    sizes: array[int] = field(default_factory=lambda: array("q"))  # of each document's text, bytes
    digest: str = ""  # of all texts, labels and spans, in order
    leaked: Found = field(default_factory=Found)  # texts that train has too

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self.sizes)

    @property
    def bytes(self) -> int:
        """Those of all texts."""
        return sum(self.sizes)


class Survey:
    """One look at every document of a data folder's train, valid and test splits."""

    def __init__(self, splits: Splits, progress: Progress) -> None:
        """Raises CorpusError for the first document that is none, for one that has a label which
        train has not, and for a split without any; TrainingError if there are no two labels."""
        self._splits = splits
        self._first: dict[bytes, tuple[Label, str]] = {}  # label and place, of each train text
        self.two_labels = Found()
        self.labels: Counter[str] = Counter()
        """How many documents of train each label has."""
        self.multi_label = False
        """Whether documents have any number of labels."""
        self.surveyed = {TRAIN: self._read(TRAIN, progress)}
        if len(self.labels) < 2:
            only = "".join(f" but {label!r}" for label in self.labels)
            raise TrainingError(f"{splits.data}: the train split has no label{only}")
        for name in (VALID, TEST) if splits.has(TEST) else (VALID,):
            self.surveyed[name] = self._read(name, progress)
        if self.surveyed[VALID].leaked.count == self.surveyed[VALID].documents:
            raise CorpusError(f"{splits.data}: train has every document of the valid split too")

    def in_train(self, document: LabelledText) -> bool:
        """Say whether train has the same text."""
        return document.digest in self._first

    def _read(self, split: str, progress: Progress) -> Surveyed:
        surveyed = Surveyed()
        digest = hashlib.blake2b(digest_size=32)
        bar = progress.add_task(f"reading {split}, documents", total=None)
        for document in self._splits.read(split):
            surveyed.sizes.append(len(document.text.encode()))
            digest.update(document.digest + repr((document.label, document.spans)).encode())
            if split == TRAIN:
                self._count(document)
            elif unknown := [label for label in document.labels if label not in self.labels]:
                raise CorpusError(
                    f"{document.where}: label {unknown[0]!r} is not among the train split's"
                )
            elif self.in_train(document):
                label, where = self._first[document.digest]
                other = "" if label == document.label else f", there {label!r}"
                surveyed.leaked.add(f"{document.where} ({where}{other})")
            progress.update(bar, advance=1)
        progress.update(bar, total=surveyed.documents)
        surveyed.digest = digest.hexdigest()
        return surveyed

    def _count(self, document: LabelledText) -> None:
        self.labels.update(document.labels)
        self.multi_label = document.multi_label
        label, where = self._first.setdefault(document.digest, (document.label, document.where))
        if label != document.label:
            example = f"{label!r} in {where}, {document.label!r} in {document.where}"
            self.two_labels.add(example)

    def warnings(self) -> Iterator[str]:
        """Yield what a user should know of the data, a sentence each."""
        for split, surveyed in self.surveyed.items():
            for path in self._splits.passed_over(split):
                yield f"{path} is not read: it is not named as the {split} split's files are"
            if leaked := surveyed.leaked.count:
                then = "they are left out of it" if split == VALID else "its figures will flatter"
                yield (
                    f"{leaked} of {split}'s {surveyed.documents} documents are in train too, so "
                    f"{then}: {surveyed.leaked.example}"
                )
        if not self._splits.has(VALID):
            yield (
                f"there is no valid split: {self.surveyed[VALID].documents} documents were drawn "
                "from train, the same ones each time"
            )
        if self.two_labels.count:
            yield (
                f"{self.two_labels.count} documents of train have the text of another, under "
                f"another label: {self.two_labels.example}"
            )
