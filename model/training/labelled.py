"""One labelled document, whatever kind of file it is from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self, TypeAlias

from gma.model.training.errors import CorpusError


class Fields(NamedTuple):
    """What the fields of a document are called in its file.

    A document has either a label, or labels: a list of any length. Where labels have no name,
    those that are there count for nothing.
    """

    text: str = "text"
    label: str = "label"
    labels: str = "labels"
    spans: str = "spans"

    @property
    def labelled(self) -> bool:
        """Whether labels count."""
        return bool(self.label)

    def columns(self, there: Sequence[str], where: str) -> tuple[str, ...]:
        """Pick the columns that count: the text's, and if labels do, the label's or the labels'.

        Raises CorpusError if one is missing or there twice, or if label and labels are both there.
        """
        of_labels = self.labels if self.labels in there else self.label
        if self.labelled and of_labels == self.labels and self.label in there:
            raise CorpusError(f"{where}: {_both(self)}")
        counting = (self.text, of_labels) if self.labelled else (self.text,)
        for name in counting:
            if there.count(name) != 1:
                many = "two columns are" if name in there else "no column is"
                raise CorpusError(f"{where}: {many} named {name!r}: they are {', '.join(there)}")
        return counting


TEXT_AND_LABEL = Fields()
TEXT_ALONE = Fields(label="", labels="")

Label: TypeAlias = str | tuple[str, ...]
"""A document's one label; or all that it has, sorted, where it may have any number."""


class Span(NamedTuple):
    """Where a text says what a label stands for, in UTF-8 bytes of it."""

    label: str
    start: int
    end: int


@dataclass(frozen=True)
class LabelledText:
    """One document of a split; nothing of it is empty or blank, but it may have no labels."""

    text: str
    label: Label
    where: str
    """File, and line or row, for errors."""
    spans: tuple[Span, ...] = ()
    """Passages that are known to speak for some of the labels."""

    @classmethod
    def of(cls, fields: Mapping[str, object], where: str, names: Fields = TEXT_AND_LABEL) -> Self:
        """Take text and label, or labels and spans of them, from the fields of a line or row.

        Raises CorpusError that names the field if they are missing, blank, or of another type, if
        there are both label and labels, and for a span that is none of the text and its labels.
        """
        label: Label
        text = text_of(fields, where, names.text)
        if not names.labelled:
            label = ()
        elif names.labels not in fields:
            label = _label(fields, where, names.label)
        elif names.label in fields:
            raise CorpusError(f"{where}: {_both(names)}")
        else:
            label = _labels(fields[names.labels], where, names.labels)
            if fields.get(names.spans) is not None:
                spans = _spans(fields[names.spans], text, label, f"{where}: {names.spans!r}")
                return cls(text, label, where, spans)
        return cls(text, label, where)

    @property
    def multi_label(self) -> bool:
        """Whether it may have any number of labels."""
        return not isinstance(self.label, str)

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels that it has."""
        return (self.label,) if isinstance(self.label, str) else self.label

    @property
    def digest(self) -> bytes:
        """What tells this text from others, whatever its label: 16 bytes."""
        return hashlib.blake2b(self.text.encode(), digest_size=16).digest()


def text_of(fields: Mapping[str, object], where: str, name: str) -> str:
    """Return the text, which is called ``name``.

    Raises CorpusError if it is missing or blank, or is no text.
    """
    text = fields.get(name)
    if not isinstance(text, str):
        raise CorpusError(f"{where}: {name!r} is missing, or no string{_hint(fields, name)}")
    if not text.strip():
        raise CorpusError(f"{where}: {name!r} is blank")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise CorpusError(f"{where}: {name!r} is not Unicode: {error}") from error
    return text


def _label(fields: Mapping[str, object], where: str, name: str) -> str:
    label = fields.get(name)
    if not _is_label(label):
        raise CorpusError(
            f"{where}: {name!r} is missing, or neither a string nor an integer"
            + _hint(fields, name)
        )
    if not str(label).strip():
        raise CorpusError(f"{where}: {name!r} is blank")
    return str(label)


def _labels(labels: object, where: str, name: str) -> tuple[str, ...]:
    if not isinstance(labels, list | tuple) or not all(map(_is_label, labels)):
        raise CorpusError(f"{where}: {name!r} is no list of strings or integers")
    if not all(str(label).strip() for label in labels):
        raise CorpusError(f"{where}: {name!r} has a blank label")
    return tuple(sorted({str(label) for label in labels}))


def _spans(spans: object, text: str, labels: tuple[str, ...], where: str) -> tuple[Span, ...]:
    if not isinstance(spans, list | tuple):
        raise CorpusError(f"{where} is no list")
    return tuple(_span(x, text.encode(), labels, f"{where}, {i}") for i, x in enumerate(spans))


def _span(span: object, text: bytes, labels: tuple[str, ...], where: str) -> Span:
    if not isinstance(span, Mapping) or not {*Span._fields} <= span.keys():
        raise CorpusError(f"{where} is no object with {', '.join(Span._fields)}")
    label, start, end = (span[name] for name in Span._fields)
    if not _is_label(label) or str(label) not in labels:
        raise CorpusError(f"{where}: label {label!r} is none of the document's")
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(text):
        raise CorpusError(
            f"{where}: start {start!r} and end {end!r} are not in order, "
            f"or not in the text's {len(text)} bytes"
        )
    for at in start, end:
        if at < len(text) and text[at] & 0xC0 == 0x80:
            raise CorpusError(f"{where}: byte {at} is inside a character")
    return Span(str(label), start, end)


def _is_label(label: object) -> bool:
    return isinstance(label, str | int) and not isinstance(label, bool)


def _both(names: Fields) -> str:
    return (
        f"{names.label!r} and {names.labels!r} are both there: a document has one label, or a list"
    )


def _hint(fields: Mapping[str, object], name: str) -> str:
    there = ", ".join(map(repr, fields))
    return f"; the fields are {there}" if name not in fields and there else ""
