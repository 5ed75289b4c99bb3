"""Packages that not everybody has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gma.model.training.errors import CorpusError


@contextmanager
def needing(what: str, extra: str = "train") -> Iterator[None]:
    """A context for imports that an extra of this package brings.

    Raises CorpusError that says what needs which package if it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise CorpusError(
            f"{what} needs {error.name}, which is not installed: gma-service[{extra}] has it"
        ) from error
