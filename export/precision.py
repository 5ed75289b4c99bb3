"""The precisions of exported models."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Precision: TypeAlias = Literal["float32", "float16", "bfloat16", "int8"]
"""What the matrices and the activations are in.

int8 is for the CPU, and for the matrix products alone: the rest is in float32.
"""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
"""All of them, the default first."""
