"""Packages that not everybody has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gma.model.training.errors import CorpusError

EXTRA = "gma-service[train]"


@contextmanager
def needing(what: str) -> Iterator[None]:
    """A context for imports that the extra ``train`` brings.

    Raises CorpusError that says what needs which package if it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise CorpusError(
            f"{what} needs {error.name}, which is not installed: {EXTRA} has it"
        ) from error
