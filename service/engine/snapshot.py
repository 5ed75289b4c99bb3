"""Snapshots: a document's state outside a runner, as arrays by name and as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors

Snapshot: TypeAlias = Mapping[str, NDArray[Any]]
"""The parts of one document's state, (1, ...) each."""


class Part(NamedTuple):
    """One part of a document's state."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


Parts: TypeAlias = Mapping[str, Part]


def encoded(snapshot: Snapshot) -> bytes:
    """A snapshot as safetensors."""
    return safetensors.save(dict(snapshot))


def decoded(data: bytes, parts: Parts) -> Snapshot:
    """The snapshot that `encoded` made bytes of. Raises ValueError unless it has just these parts,
    and nothing but numbers that are finite."""
    try:
        snapshot = safetensors.load(data)
    except SafetensorError as error:
        raise ValueError(f"no snapshot: {error}") from None
    if {name: Part(x.shape, x.dtype) for name, x in snapshot.items()} != {
        name: Part((1, *part.shape), part.dtype) for name, part in parts.items()
    }:
        raise ValueError("a snapshot of another form")
    if not all(np.isfinite(x).all() for x in snapshot.values()):
        raise ValueError("a snapshot with numbers that are not finite")
    return snapshot
