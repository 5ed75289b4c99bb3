"""One labelled document, whatever kind of file it is from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

from gma.model.training.errors import CorpusError


class Fields(NamedTuple):
    """What the fields of a document are called in its file."""

    text: str = "text"
    label: str = "label"


TEXT_AND_LABEL = Fields()


@dataclass(frozen=True)
class LabelledText:
    """One document of a split; nothing of it is empty or blank."""

    text: str
    label: str
    where: str
    """File, and line or row, for errors."""

    @classmethod
    def of(cls, fields: Mapping[str, object], where: str, names: Fields = TEXT_AND_LABEL) -> Self:
        """Take text and label from the fields of a line or row.

        Raises CorpusError that names the field if they are missing, blank, or of another type.
        """
        label = fields.get(names.label)
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise CorpusError(
                f"{where}: {names.label!r} is missing, or neither a string nor an integer"
                + _hint(fields, names.label)
            )
        if not str(label).strip():
            raise CorpusError(f"{where}: {names.label!r} is blank")
        return cls(text_of(fields, where, names.text), str(label), where)

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


def _hint(fields: Mapping[str, object], name: str) -> str:
    there = ", ".join(map(repr, fields))
    return f"; the fields are {there}" if name not in fields and there else ""
