"""One labelled document, whatever kind of file it is from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from gma.model.training.errors import CorpusError


@dataclass(frozen=True)
class LabelledText:
    """One document of a split; nothing of it is empty or blank."""

    text: str
    label: str
    where: str
    """File, and line or row, for errors."""

    @classmethod
    def of(cls, fields: Mapping[str, object], where: str) -> Self:
        """Take ``text`` and ``label`` from the fields of a line or row.

        Raises CorpusError that names the field if they are missing, blank, or of another type.
        """
        label = fields.get("label")
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise CorpusError(
                f"{where}: 'label' is missing, or neither a string nor an integer{_hint(fields)}"
            )
        if not str(label).strip():
            raise CorpusError(f"{where}: 'label' is blank")
        return cls(text_of(fields, where), str(label), where)

    @property
    def digest(self) -> bytes:
        """What tells this text from others, whatever its label: 16 bytes."""
        return hashlib.blake2b(self.text.encode(), digest_size=16).digest()


def text_of(fields: Mapping[str, object], where: str) -> str:
    """Return the field ``text``. Raises CorpusError if it is missing or blank, or is no text."""
    text = fields.get("text")
    if not isinstance(text, str):
        raise CorpusError(f"{where}: 'text' is missing, or no string{_hint(fields)}")
    if not text.strip():
        raise CorpusError(f"{where}: 'text' is blank")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise CorpusError(f"{where}: 'text' is not Unicode: {error}") from error
    return text


def _hint(fields: Mapping[str, object]) -> str:
    lacking = {"text", "label"} - fields.keys()
    there = ", ".join(map(repr, fields))
    return f"; the fields are {there}" if lacking and there else ""
