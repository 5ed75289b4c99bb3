"""Checkpoints that figures are of."""

from __future__ import annotations

from gma.model.config import DEFAULT_CHECKPOINT

BOOKS = DEFAULT_CHECKPOINT.parent / "books"
"""Which came first: benchmarks stay with it, so that their figures can be compared over time."""
