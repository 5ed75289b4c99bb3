"""Memory of the fused step that stays where it is: what it is given, what it answers, and between.

Shapes: R rows of C tokens, N = R * C, D = R documents, W width, H heads, v value_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gma.model.config import ModelConfig
from gma.model.fused.obstacles import FusedPrecision
from gma.model.fused.parameters import ACTIVATIONS, FLOAT8


@dataclass(frozen=True)
class Inputs:
    """A step's input, see `Classifier.step`.

    Slots of distinct documents are distinct, but for documents without rows. first_row and
    row_count of a document tell where its rows stand; a document without rows has none.
    """

    tokens: Tensor  # (R, C) int32: ids of the vocabulary, where no token is too
    lengths: Tensor  # (R,) int32
    document: Tensor  # (R,) int32
    slots: Tensor  # (D,) int32
    fresh: Tensor  # (D,) int32: 1 where the document begins here, whatever lies in its slot
    first_row: Tensor  # (D,) int32
    row_count: Tensor  # (D,) int32
    whole: Tensor  # (R * (C + 6),) int32: all of it, in one piece

    @classmethod
    def empty(
        cls, grid: tuple[int, int], device: torch.device | str, *, pinned: bool = False
    ) -> Inputs:
        """Make one in which no document has rows.

        `pinned`: in memory that a GPU copies from by itself.
        """
        rows, chunk = grid
        size = rows * (chunk + 6)
        whole = torch.zeros(size, dtype=torch.int32, device=device, pin_memory=pinned)
        ids, rest = whole[: rows * chunk], whole[rows * chunk :].view(6, rows)
        return cls(ids.view(rows, chunk), *rest, whole)  # type: ignore[call-arg]


@dataclass(frozen=True)
class Outputs:
    """What a step answers; the next step overwrites it.

    Rows and documents that were not used hold anything.
    """

    evidence: Tensor  # (R, labels) float32: sum of the scores of the row's tokens
    logits: Tensor  # (D, labels) float64, over all that was read of the document
    whole: Tensor  # (bytes,) uint8: both, in one piece

    @classmethod
    def empty(
        cls, rows: int, labels: int, device: torch.device | str, *, pinned: bool = False
    ) -> Outputs:
        """Make one of zeros; `pinned`: see `Inputs.empty`."""
        size = rows * labels
        whole = torch.zeros(size * 12, dtype=torch.uint8, device=device, pin_memory=pinned)
        logits, evidence = whole[: size * 8], whole[size * 8 :]
        return cls(
            evidence.view(torch.float32).view(rows, labels),
            logits.view(torch.float64).view(rows, labels),
            whole,
        )


class Activations(NamedTuple):
    """What a step's kernels leave for each other, of each of N tokens: in `ACTIVATIONS` of its
    precision, or narrower as products take it, or float32."""

    x: Tensor  # (N, W): a layer's input
    y: Tensor  # (N, W): its output
    normal: Tensor  # (N, W): one of both, normalised, as products take it
    last: Tensor  # (N, W): what the pooling reads
    routed: Tensor  # (N, what a mixer projects, and more)
    read: Tensor  # (N, H * v), what the mixer reads, as products take it
    hidden: Tensor  # (N, mlp_width), as products take it
    deep: Tensor  # (N, labels + 1 and more) float32
    inverse: Tensor  # (N,) float32: one over a row's root mean square

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        tokens: int,
        routed: int,
        scores: int,
        precision: FusedPrecision,
        device: torch.device,
    ) -> Activations:
        """Allocate them for so many tokens; `scores` is how wide `deep` is."""
        read = config.heads * config.value_dim
        plain = ACTIVATIONS[precision]
        narrow = FLOAT8 if precision == "fp8" else plain

        def buffer(*width: int, dtype: torch.dtype = plain) -> Tensor:
            return torch.empty((tokens, *width), dtype=dtype, device=device)

        normal = buffer(config.width, dtype=narrow)
        return cls(
            x=buffer(config.width),
            y=buffer(config.width),
            normal=normal,
            last=normal if narrow == plain else buffer(config.width),
            routed=buffer(routed),
            read=buffer(read, dtype=narrow),
            hidden=buffer(config.mlp_width, dtype=narrow),
            deep=buffer(scores, dtype=torch.float32),
            inverse=buffer(dtype=torch.float32),
        )

    def first(self, tokens: int) -> Activations:
        """Return the activations of the first so many tokens."""
        return Activations(*(x[:tokens] for x in self))
