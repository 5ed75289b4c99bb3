"""Which implementation of the operation a model uses. It is chosen once, and said."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gma.model.config import BackboneConfig
from gma.model.ops import chunked, forgetting
from gma.model.ops.triton.limits import misfit


class Operation(NamedTuple):
    """An implementation; for what its functions take and give see `gma.model.ops.chunked`."""

    name: str
    causal: Callable[..., tuple[Tensor, Tensor, Tensor]]
    write: Callable[..., tuple[Tensor, Tensor]]
    read: Callable[..., Tensor]
    forgetting: Callable[..., tuple[Tensor, Tensor, Tensor]]


CHUNKED = Operation("chunked", chunked.causal, chunked.write, chunked.read, forgetting.causal)


def choose(config: BackboneConfig, weight: Tensor) -> Operation:
    """Choose Triton's kernels on a CUDA device if they fit the model, else the chunked form.

    weight: any of the model's, for its device and dtype.
    """
    exact = weight.dtype == torch.float64
    if weight.is_cuda and not exact and misfit(config, weight.dtype) is None:
        from gma.model.ops.triton import operators  # needs Triton, which only a GPU's machine has

        return Operation(
            "triton", operators.causal, operators.write, operators.read, operators.forgetting
        )
    return CHUNKED
