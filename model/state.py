"""All that a document's future needs of its past."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gma.model.config import BackboneConfig


@dataclass(frozen=True)
class State:
    """The states of D documents; their size does not depend on how much was read.

    D documents, L ``memories``, H heads, K components, v value_dim, T tail (``conv_kernel - 1``),
    W width. What is float32 here is float64 where the weights are. The pooled sums are always
    float64, so that ten million tokens add up to what their chunks say.

    A bidirectional model's are those of one pass: memory 0 is read, memory 1 is written.
    """

    memory: Tensor  # (D, L, H, K, v) float32
    mass: Tensor  # (D, L, H, K) float32
    tail: Tensor  # (D, L, T, W) float32: the convolutions' last inputs
    evidence: Tensor  # (D, labels) float64: sum of weight * score over the tokens read
    weight: Tensor  # (D,) float64: sum of the weights

    @classmethod
    def zeros(
        cls,
        config: BackboneConfig,
        documents: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> State:
        """Make states of documents of which nothing was read yet."""
        layers, heads, components = config.memories, config.heads, config.num_components

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(documents, *shape, device=device, dtype=dtype)

        return cls(
            memory=zeros(layers, heads, components, config.value_dim),
            mass=zeros(layers, heads, components),
            tail=zeros(layers, config.tail, config.width),
            evidence=zeros(config.label_count, dtype=torch.float64),
            weight=zeros(dtype=torch.float64),
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the tensor of every part, in a fixed order."""
        for field in fields(self):
            yield field.name, getattr(self, field.name)

    @property
    def nbytes(self) -> int:
        """The bytes of all D documents' states."""
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def gather(self, documents: Tensor) -> State:
        """Copy the states at these indices, (n,) int64."""
        return State(**{name: x.index_select(0, documents) for name, x in self.tensors()})

    def scatter_(self, documents: Tensor, states: State) -> None:
        """Overwrite the states at these distinct indices, (n,) int64, in place."""
        for name, mine in self.tensors():
            mine.index_copy_(0, documents, getattr(states, name))

    def turned(self, begins: Tensor) -> State:
        """Begin a pass of some documents, `begins` (D,) bool, of a bidirectional model.

        What was written is read from now on, and nothing is written or pooled yet.
        """

        def turn(x: Tensor) -> Tensor:
            # Chosen, not multiplied: what another document left behind may hold NaN.
            after = torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)
            return torch.where(begins.view(-1, *[1] * (x.dim() - 1)), after, x)

        return State(
            memory=turn(self.memory),
            mass=turn(self.mass),
            tail=turn(self.tail),
            evidence=self.evidence.masked_fill(begins[:, None], 0),
            weight=self.weight.masked_fill(begins, 0),
        )

    def copy(self) -> State:
        """Copy all states."""
        return State(**{name: x.clone() for name, x in self.tensors()})

    def to(self, device: torch.device | str) -> State:
        """Copy the states to another device, or return them if they are there."""
        return State(**{name: x.to(device) for name, x in self.tensors()})
