"""What the operators are given: whether the kernels can take it, and in which form they do.

Shapes: R rows of C tokens, D documents, H heads, r routing_dim, K components, v value_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gma.model.ops.chunked import Coefficients
from gma.model.ops.triton.device import INTERPRETED as INTERPRETED_CONSTANT
from gma.model.ops.triton.limits import MIXTURE, SIZES

INTERPRETED = bool(INTERPRETED_CONSTANT.value)

DTYPES = torch.bfloat16, torch.float32

SHAPES = {
    "q": "RCHr",
    "k": "RCHr",
    "val": "RCHv",
    "log_keep": "RCH",
    "memory": "DHKv",
    "mass": "DHK",
    "linear": "HKr",
    "quadratic": "HKr",
    "bias": "HK",
    "lengths": "R",
    "document": "R",
    "first": "D",
    "count": "D",
}
"""The dimensions of each tensor, in the letters of this file's head."""


def check(mixture: Coefficients, **others: Tensor | None) -> None:
    """Raise ValueError for what the kernels can't take."""
    given = {name: x for name, x in others.items() if x is not None}
    tensors = given | mixture._asdict()
    sizes: dict[str, int] = {}
    for name, x in tensors.items():
        expected = [sizes.setdefault(*pair) for pair in zip(SHAPES[name], x.shape, strict=False)]
        if x.ndim != len(SHAPES[name]) or list(x.shape) != expected:
            raise ValueError(f"{name} is {tuple(x.shape)}, not {SHAPES[name]} with {sizes}")
    if not {sizes[name] for name in "rKv" if name in sizes} <= SIZES:
        raise ValueError(f"r, K and v must be of {sorted(SIZES)}, not {sizes}")
    tokens = [tensors[name] for name in ("q", "k", "val") if name in tensors]
    device, dtype = tokens[0].device, tokens[0].dtype
    if dtype not in DTYPES or any(x.dtype != dtype for x in tokens):
        raise ValueError(f"q, k and val must be of one dtype of {DTYPES}")
    if dtype == torch.float32 and sizes["r"] * sizes["K"] > MIXTURE:
        raise ValueError(f"in float32 r * K must be at most {MIXTURE}, not {sizes}")
    wide = {"memory", "mass", "log_keep", *Coefficients._fields} & tensors.keys()
    if any(tensors[name].dtype != torch.float32 for name in wide):
        raise ValueError("memory, mass, log_keep and mixture must be float32")
    if not all(x.is_contiguous() for x in tensors.values() if x.ndim == 1):
        raise ValueError("lengths, document, first and count must be contiguous")
    if any(x.device != device for x in tensors.values()):
        raise ValueError("all tensors must be on one device")
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"Triton's kernels need a CUDA device, not {device.type}: use gma.model.ops.chunked, "
            "or set TRITON_INTERPRET=1 before triton is imported"
        )


def contiguous(linear: Tensor, quadratic: Tensor, bias: Tensor) -> Coefficients:
    """Return a mixture as kernels take it."""
    return Coefficients(linear.contiguous(), quadratic.contiguous(), bias.contiguous())


def unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors whose last dimension, which kernels take to be so, is contiguous."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def packed(memory: Tensor, mass: Tensor) -> Tensor:
    """Put memory (D, H, K, v) and mass (D, H, K) as kernels hold states: (D, H, v + 1, K)."""
    return torch.cat([memory, mass[..., None]], -1).mT.contiguous()


def unpacked(states: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of what `packed` was given."""
    return states[:, :, :-1].mT, states[:, :, -1]
