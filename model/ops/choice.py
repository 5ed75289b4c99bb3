"""Which implementation of the operation a model uses. It is chosen once, and said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from model.config import ModelConfig
from model.ops import chunked

SIZES = frozenset({16, 32, 64, 128})
"""What routing_dim, num_components and value_dim may be for Triton's kernels."""


Precision: TypeAlias = Literal["bfloat16", "fp8"]
"""What the fused step multiplies matrices in."""

TAPS = 4
"""Of the short convolution in the fused step, at most."""

ALIGNMENT = 16
"""Bytes that rows of its matrices must be multiples of."""


class Operation(NamedTuple):
    """An implementation; for what its functions take and give see `model.ops.chunked`."""

    name: str
    causal: Callable[..., tuple[Tensor, Tensor, Tensor]]
    write: Callable[..., tuple[Tensor, Tensor]]
    read: Callable[..., Tensor]

    @classmethod
    def of(cls, module: Any) -> Operation:
        name = module.__name__.rpartition(".")[2]
        return cls(name, module.causal, module.write, module.read)


CHUNKED = Operation.of(chunked)


def misfit(config: ModelConfig) -> str | None:
    """Why Triton's kernels can't compute this model, or None."""
    sizes = config.routing_dim, config.num_components, config.value_dim
    if set(sizes) <= SIZES:
        return None
    return f"routing_dim, num_components and value_dim must be of {sorted(SIZES)}, not {sizes}"


def choose(config: ModelConfig, weight: Tensor) -> Operation:
    """Triton's kernels on a CUDA device if they fit the model, else PyTorch's chunked form.

    weight: any of the model's.
    """
    exact = weight.dtype == torch.float64
    if weight.is_cuda and not exact and misfit(config) is None:
        from model.ops import triton  # is not installed where there is no GPU

        return Operation.of(triton)
    return CHUNKED


def obstacle(config: ModelConfig, precision: Precision = "bfloat16") -> str | None:
    """Why this model has no fused step, or None."""
    each = ALIGNMENT // (1 if precision == "fp8" else 2)
    sizes = config.width, config.mlp_width, config.heads * config.value_dim
    if not config.causal:
        return "it is bidirectional"
    if config.conv_kernel > TAPS:
        return f"conv_kernel must be at most {TAPS}, not {config.conv_kernel}"
    if any(size % each for size in sizes):
        return f"width, mlp_width and heads * value_dim must be multiples of {each}, not {sizes}"
    return misfit(config)
