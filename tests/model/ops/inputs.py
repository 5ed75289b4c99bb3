"""One document for the operation, and the chunked form on it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gma.model.ops import chunked, reference
from gma.model.ops.chunked import Coefficients, Rows

EPSILON = 1e-6


class Input(NamedTuple):
    """One document and one mixture, float64: N tokens, H heads, r, K, v."""

    q: Tensor  # (N, H, r)
    k: Tensor
    val: Tensor  # (N, H, v)
    mixture: tuple[Tensor, Tensor, Tensor]  # mu and var (H, K, r), log_pi (H, K)
    memory: Tensor  # (H, K, v)
    mass: Tensor  # (H, K)

    def gammas(self) -> tuple[Tensor, Tensor]:
        return (
            reference.responsibilities(self.q, *self.mixture),
            reference.responsibilities(self.k, *self.mixture),
        )

    def to(self, dtype: torch.dtype) -> Input:
        """Tokens in this dtype; mixture and state in at least float32."""
        least = torch.promote_types(dtype, torch.float32)
        mu, var, log_pi = (x.to(least) for x in self.mixture)
        return Input(
            self.q.to(dtype),
            self.k.to(dtype),
            self.val.to(dtype),
            (mu, var, log_pi),
            self.memory.to(least),
            self.mass.to(least),
        )


def make(tokens: int, heads: int = 2, r: int = 5, components: int = 7, v: int = 3) -> Input:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mass = normal(heads, components).abs() * 10
    mixture = (
        normal(heads, components, r),
        normal(heads, components, r).exp() + 0.01,
        torch.log_softmax(normal(heads, components), -1),
    )
    return Input(
        normal(tokens, heads, r),
        normal(tokens, heads, r),
        normal(tokens, heads, v) + 0.5,
        mixture,
        normal(heads, components, v) * mass[..., None],
        mass,
    )


def normalized(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def causal(x: Input, *, normalize: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The chunked form on one row."""
    out, memory, mass = chunked.causal(
        x.q[None],
        x.k[None],
        x.val[None],
        x.memory[None],
        x.mass[None],
        Coefficients.of(*x.mixture),
        one_row(len(x.q), x.memory.dtype),
        normalize=normalize,
        epsilon=EPSILON,
    )
    return out[0], memory[0], mass[0]


def bidirectional(x: Input, *, normalize: bool = False) -> Tensor:
    mixture = Coefficients.of(*x.mixture)
    rows = one_row(len(x.q), x.memory.dtype)
    memory, mass = chunked.write(x.k[None], x.val[None], mixture, rows, normalize=normalize)
    return chunked.read(
        x.q[None], memory, mass, mixture, rows, normalize=normalize, epsilon=EPSILON
    )[0]


def one_row(tokens: int, dtype: torch.dtype) -> Rows:
    return Rows.of(torch.tensor([tokens]), torch.tensor([0]), tokens, dtype)
