"""The shape of a step."""

from typing import NamedTuple


class Grid(NamedTuple):
    """R rows of C tokens."""

    rows: int
    chunk: int
