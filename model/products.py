"""A layer's matrix products on a CPU, in the precision that was chosen.

Shapes: n tokens, I inputs, O outputs.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from gma.model.ops.cpu.library import Library

Precision: TypeAlias = Literal["float32", "bfloat16", "int8"]
"""What tokens and matrices are rounded to before they are multiplied; what they are rounded from,
and what comes of it, is float32."""


def obstacle(precision: Precision) -> str | None:
    """Return why this processor is no faster in a precision, or None if it should be.

    Products are right on every processor, but without the instructions PyTorch multiplies by plain
    loops.
    """
    if precision == "bfloat16" and not torch.cpu._is_avx512_bf16_supported():
        return "this processor has not the instructions AVX512-BF16"
    if precision == "int8" and not torch.cpu._is_vnni_supported():
        return "this processor has not the instructions AVX512-VNNI"
    return None


class Scratch(NamedTuple):
    """What products of tokens work in."""

    rounded: Tensor  # (n * I,) of the product with the most inputs
    found: Tensor  # (n * O,) of that with the most outputs
    scale: Tensor  # (n,)


class Product(Protocol):
    """What multiplies tokens x (n, I) by a matrix."""

    inputs: int
    outputs: int

    @staticmethod
    def scratch(tokens: int, inputs: int, outputs: int) -> Scratch:
        """Make what products of up to so many need."""
        ...

    def put(self, x: Tensor, y: Tensor, scratch: Scratch, *, gelu: bool = False) -> None:
        """Write the product, or GELU of it in its form with tanh, over y (n, O)."""
        ...

    def add(self, x: Tensor, y: Tensor, scratch: Scratch) -> None:
        """Add the product to y (n, O)."""
        ...


class Float32:
    """By a matrix (O, I), as it is: in kernels of our own, for which a token is alone."""

    def __init__(self, weight: Tensor, library: Library) -> None:
        self.outputs, self.inputs = weight.shape
        self._packed, self._library = library.packed(weight.t().contiguous()), library

    @staticmethod
    def scratch(tokens: int, inputs: int, outputs: int) -> Scratch:
        return Scratch(*(torch.empty(0) for _ in range(3)))

    def put(self, x: Tensor, y: Tensor, scratch: Scratch, *, gelu: bool = False) -> None:
        self._library.multiply(x, self._packed, y, gelu=gelu)

    def add(self, x: Tensor, y: Tensor, scratch: Scratch) -> None:
        self._library.multiply(x, self._packed, y, add=True)


class Bfloat16:
    """By a matrix (O, I) in bfloat16. Sums are float32, and rounded once; in which order they are
    made PyTorch's library decides by the number of tokens."""

    def __init__(self, weight: Tensor, library: Library) -> None:
        self.outputs, self.inputs = weight.shape
        self._library = library
        self._weight = weight.t().to(torch.bfloat16).contiguous()

    @staticmethod
    def scratch(tokens: int, inputs: int, outputs: int) -> Scratch:
        make = partial(torch.empty, dtype=torch.bfloat16)
        return Scratch(make(tokens * inputs), make(tokens * outputs), make(0))

    def put(self, x: Tensor, y: Tensor, scratch: Scratch, *, gelu: bool = False) -> None:
        y.copy_(self._of(x, scratch))
        if gelu:
            self._library.gelu_(y)

    def add(self, x: Tensor, y: Tensor, scratch: Scratch) -> None:
        y.add_(self._of(x, scratch))

    def _of(self, x: Tensor, scratch: Scratch) -> Tensor:
        rounded = scratch.rounded[: x.numel()].view(x.shape).copy_(x)
        found = scratch.found[: len(x) * self.outputs].view(len(x), self.outputs)
        return torch.mm(rounded, self._weight, out=found)


class Int8:
    """By a matrix (O, I) in int8, each output with a scale, as each token has one. Sums are exact,
    and a token's does not depend on the others."""

    def __init__(self, weight: Tensor, library: Library) -> None:
        self.outputs, self.inputs = weight.shape
        rounded = torch.empty(weight.shape, dtype=torch.int8)
        self._scale = torch.empty(self.outputs)
        library.quantize(weight.contiguous(), rounded, self._scale)
        self._weight, self._library = rounded.t(), library

    @staticmethod
    def scratch(tokens: int, inputs: int, outputs: int) -> Scratch:
        return Scratch(
            torch.empty(tokens * inputs, dtype=torch.int8),
            torch.empty(tokens * outputs, dtype=torch.int32),
            torch.empty(tokens),
        )

    def put(self, x: Tensor, y: Tensor, scratch: Scratch, *, gelu: bool = False) -> None:
        self._of(x, y, scratch, add=False)
        if gelu:
            self._library.gelu_(y)

    def add(self, x: Tensor, y: Tensor, scratch: Scratch) -> None:
        self._of(x, y, scratch, add=True)

    def _of(self, x: Tensor, y: Tensor, scratch: Scratch, *, add: bool) -> None:
        rounded = scratch.rounded[: x.numel()].view(x.shape)
        sums = scratch.found[: y.numel()].view(y.shape)
        self._library.quantize(x, rounded, scratch.scale)
        torch._int_mm(rounded, self._weight, out=sums)
        self._library.dequantize(sums, scratch.scale, self._scale, y, add=add)


PRODUCTS: dict[Precision, type[Float32 | Bfloat16 | Int8]] = {
    "float32": Float32,
    "bfloat16": Bfloat16,
    "int8": Int8,
}
