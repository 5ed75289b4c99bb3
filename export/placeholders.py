"""The torch operators that stand for those of ``ai.gma`` while a step is traced.

They know shapes only: they are exported, never run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gma.export.operators import DOMAIN, VERSION

placeholders = torch.ops.gma_exported
"""What a module to be traced calls: `placeholders.causal` and so on."""

_library = torch.library.Library("gma_exported", "DEF")  # type: ignore[no-untyped-call]
_ROWS = "Tensor lengths, Tensor document_of_row, Tensor fresh"


def _placeholder(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define a torch operator; the decorated function makes its outputs by shapes alone."""

    def define(shapes: Callable[..., Any]) -> Callable[..., Any]:
        name = _library.define(schema)  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"gma_exported::{name}", shapes)
        return shapes

    return define


@_placeholder(
    "causal(Tensor routed, Tensor memory, Tensor mass, Tensor linear, Tensor quadratic, "
    f"Tensor bias, {_ROWS}, *, int normalize, float epsilon, float routing_epsilon) "
    "-> (Tensor, Tensor, Tensor)"
)
def _causal_shapes(
    routed: Tensor, memory: Tensor, mass: Tensor, *_: Tensor, **__: float
) -> tuple[Tensor, Tensor, Tensor]:
    out = routed.new_empty(*routed.shape[:2], memory.shape[1] * memory.shape[3])
    return out, torch.empty_like(memory), torch.empty_like(mass)


@_placeholder(
    "forgetting(Tensor routed, Tensor memory, Tensor mass, Tensor linear, Tensor quadratic, "
    f"Tensor bias, {_ROWS}, Tensor keep_bias, *, int normalize, float epsilon, "
    "float routing_epsilon, float most_forgotten) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _forgetting_shapes(
    routed: Tensor, memory: Tensor, mass: Tensor, *_: Tensor, **__: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    usage = mass.new_empty(routed.shape[0], *mass.shape[1:])
    return *_causal_shapes(routed, memory, mass), usage


@_placeholder(
    "short_convolution(Tensor x, Tensor tail, Tensor scale, Tensor taps, "
    f"{_ROWS}, *, float epsilon) -> (Tensor, Tensor, Tensor)"
)
def _convolution_shapes(
    x: Tensor, tail: Tensor, *_: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), torch.empty_like(tail)


@_placeholder("normalize(Tensor x, *, float epsilon) -> Tensor")
def _normalize_shapes(x: Tensor, *, epsilon: float) -> Tensor:
    return torch.empty_like(x)


@_placeholder("linear(Tensor x, Tensor weight, Tensor? residual, *, str activation) -> Tensor")
def _linear_shapes(
    x: Tensor, weight: Tensor, residual: Tensor | None, *, activation: str
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Tell `torch.onnx.export` which operator of ``ai.gma`` each placeholder stands for."""
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, VERSION)
    return {
        placeholders.causal.default: domain.CausalGMA,
        placeholders.forgetting.default: domain.ForgettingGMA,
        placeholders.short_convolution.default: domain.ShortConvolution,
        placeholders.normalize.default: domain.Normalize,
        placeholders.linear.default: domain.Linear,
    }
