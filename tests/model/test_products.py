"""Matrix products on a CPU, on any processor: those without the instructions multiply slowly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gma.model.ops.cpu.library import Library, library
from gma.model.products import PRODUCTS, Precision
from tests.model.small import error

TOLERANCES: dict[Precision, float] = {"float32": 1e-6, "bfloat16": 1e-2, "int8": 2e-2}


def found(precision: Precision, x: Tensor, weight: Tensor, y: Tensor | None = None) -> Tensor:
    """x by a matrix (O, I), added to y if there is one."""
    kernels = library()
    assert isinstance(kernels, Library)
    product = PRODUCTS[precision](weight, kernels)
    scratch = product.scratch(len(x) + 1, product.inputs, product.outputs)
    if y is None:
        y = x.new_full((len(x), product.outputs), torch.nan)
        product.put(x, y, scratch)
    else:
        product.add(x, y, scratch)
    return y


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


@pytest.mark.parametrize("precision", PRODUCTS)
@pytest.mark.parametrize(("n", "i", "o"), [(1, 1, 1), (3, 17, 5), (130, 192, 385), (0, 8, 8)])
def test_they_are_those_of_float64(precision: Precision, n: int, i: int, o: int) -> None:
    x, weight, y = random(n, i), random(o, i) / i**0.5, random(n, o)
    exact = x.double() @ weight.double().t()
    assert error(found(precision, x, weight), exact) <= TOLERANCES[precision]
    assert error(found(precision, x, weight, y.clone()), exact + y) <= TOLERANCES[precision]


@pytest.mark.parametrize("precision", PRODUCTS)
def test_tokens_and_outputs_of_very_different_sizes(precision: Precision) -> None:
    """Each has a scale of its own: none drowns beside a larger one."""
    x, weight = random(9, 64), random(7, 64)
    sizes = 10.0 ** torch.arange(-4, 5)
    exact = x.double() @ weight.double().t()
    y = found(precision, x * sizes[:, None], weight * sizes[:7, None])
    for row, size in enumerate(sizes):
        for column, other in enumerate(sizes[:7]):
            off = y[row, column].double() / size / other - exact[row, column]
            assert off.abs() <= TOLERANCES[precision] * exact.abs().max()


@pytest.mark.parametrize("precision", PRODUCTS)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite(precision: Precision, number: float) -> None:
    x, weight = random(5, 33), random(6, 33)
    spoiled = x.clone()
    spoiled[2, 30] = number
    y = found(precision, spoiled, weight)
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], found(precision, x, weight)[others])
    assert not y[2].isfinite().any()


@pytest.mark.parametrize("precision", PRODUCTS)
def test_a_token_of_nothing(precision: Precision) -> None:
    x, weight = random(3, 33), random(6, 33)
    x[1] = 0
    assert torch.equal(found(precision, x, weight)[1], torch.zeros(6))


def test_integers_are_exact() -> None:
    x = torch.randint(-127, 128, (40, 300)).float()
    weight = torch.randint(-127, 128, (20, 300)).float()
    x[:, 0], weight[:, 0] = 127, 127
    assert torch.equal(found("int8", x, weight), x @ weight.t())
