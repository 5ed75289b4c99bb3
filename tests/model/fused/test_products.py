"""Matrix products with what is done on their way, against float64: interpreted where no GPU is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.model.small import error

pytest.importorskip("triton")

from gma.model.fused.products import Tiles, multiply
from tests.interpreting import DEVICE, KERNELS

pytestmark = KERNELS

FLOAT8 = torch.float8_e4m3fn
TOLERANCES = {torch.bfloat16: 5e-3, FLOAT8: 4e-2}
"""By what out holds: half of its last bit, relative to the largest."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def between_nans(x: Tensor) -> Tensor:
    """The same on the device, with rows of NaN before and after it."""
    padded = torch.full((len(x) + 2, x.shape[1]), torch.nan).to(x.dtype).to(DEVICE)
    padded[1:-1] = x.to(DEVICE)
    return padded


def compare(
    a: Tensor,
    weight: Tensor,
    *,
    alpha: float = 1.0,
    factor: Tensor | None = None,
    gelu: bool = False,
    add: bool = False,
    out: torch.dtype = torch.bfloat16,
    multiprocessors: int = 3,
) -> None:
    """Nothing but the tensors is read or written, and not what out held unless it is added to."""
    expected = alpha * a.double() @ weight.double().T
    if factor is not None:
        expected *= factor.double()[:, None]
    before = torch.full(expected.shape, torch.nan).to(out)
    if add:
        before = normal(*expected.shape, seed=7).to(out)
        expected += before.double()
    if gelu:
        expected = functional.gelu(expected, approximate="tanh")
    padded = between_nans(before)
    multiply(
        between_nans(a)[1:-1],
        between_nans(weight)[1:-1],
        padded[1:-1],
        multiprocessors=multiprocessors,
        alpha=alpha,
        factor=None if factor is None else factor.to(DEVICE),
        gelu=gelu,
        add=add,
    )
    assert padded.float()[[0, -1]].isnan().all()
    assert error(padded[1:-1].cpu(), expected) <= TOLERANCES[out]


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8])
@pytest.mark.parametrize(
    ("tokens", "inner", "outputs"),
    [(1, 16, 8), (63, 48, 200), (130, 80, 48), (130, 16, 200), (63, 80, 8), (1, 144, 48)],
)
def test_sizes_that_divide_no_tile(
    tokens: int, inner: int, outputs: int, dtype: torch.dtype
) -> None:
    compare(normal(tokens, inner).to(dtype), normal(outputs, inner, seed=1).to(dtype))


@pytest.mark.parametrize(
    "how",
    [
        {"alpha": -0.3},
        {"factor": normal(130, seed=2)},
        {"gelu": True},
        {"add": True},
        {"alpha": 0.5, "factor": normal(130, seed=2).abs(), "gelu": True},
        {"alpha": 2.0, "factor": normal(130, seed=2), "add": True},
    ],
    ids=lambda how: "-".join(how),
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8])
def test_what_is_done_on_the_way(how: dict[str, object], dtype: torch.dtype) -> None:
    a, weight = normal(130, 48).to(dtype), normal(72, 48, seed=1).to(dtype)
    compare(a, weight, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("gelu", [False, True])
def test_into_float8(gelu: bool) -> None:
    a, weight = normal(63, 48).to(FLOAT8), normal(80, 48, seed=1).to(FLOAT8)
    compare(a, weight, gelu=gelu, out=FLOAT8)


def gelu_of(values: Tensor) -> Tensor:
    """Each value alone, as a product with one."""
    a = torch.zeros(len(values), 16, dtype=torch.bfloat16)
    a[:, 0] = values
    weight = torch.eye(16, dtype=torch.bfloat16)
    out = torch.empty(len(values), 16, dtype=torch.bfloat16, device=DEVICE)
    multiply(a.to(DEVICE), weight.to(DEVICE), out, multiprocessors=3, gelu=True)
    return out.cpu()[:, 0].double()


def test_gelu_where_it_bends() -> None:
    values = torch.linspace(-2.0, 2.0, 100).bfloat16()
    expected = functional.gelu(values.double(), approximate="tanh")
    assert error(gelu_of(values), expected) <= 2.5e-3


def test_gelu_of_what_is_large() -> None:
    """Where the square overflows float16, GELU is its input or nothing."""
    values = torch.tensor([-60000.0, -300.0, -12.0, 12.0, 300.0, 60000.0]).bfloat16()
    found = gelu_of(values)
    assert error(found, values.double().clamp_min(0.0)) <= TOLERANCES[torch.bfloat16]
    assert (found[:3] == 0.0).all()


def test_each_row_is_its_own() -> None:
    """What is not finite in one row of a changes no other row of out."""
    a, weight = normal(70, 48).bfloat16(), normal(24, 48, seed=1).bfloat16().to(DEVICE)
    outs = []
    for poison in (1.0, torch.nan):
        a[5, 7] = poison
        out = torch.empty(70, 24, dtype=torch.bfloat16, device=DEVICE)
        multiply(a.to(DEVICE), weight, out, multiprocessors=3)
        outs.append(torch.cat([out[:5], out[6:]]))
    assert outs[0].isfinite().all()
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("multiprocessors", "gelu", "shape"),
    [
        (1, False, (128, 256)),
        (1, True, (128, 128)),
        (6, False, (128, 128)),
        (7, True, (64, 128)),
        (99, False, (64, 64)),
    ],
)
def test_every_way_to_cut(multiprocessors: int, gelu: bool, shape: tuple[int, int]) -> None:
    """Few programs take tile after tile; many get small ones."""
    tiles = Tiles.of(140, 304, multiprocessors, gelu=gelu)
    assert (tiles.m, tiles.n) == shape
    a, weight = normal(140, 16).bfloat16(), normal(304, 16, seed=1).bfloat16()
    compare(a, weight, gelu=gelu, multiprocessors=multiprocessors)
