"""The operation in Triton, forward and backward, against float64: interpreted where no GPU is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gma.model.ops import reference
from gma.model.ops.choice import CHUNKED
from gma.model.ops.chunked import Coefficients, Rows
from tests.model.small import error

pytest.importorskip("triton")

from gma.model.ops.triton import operators
from gma.model.ops.triton.launch import Cut
from tests.interpreting import DEVICE, KERNELS
from tests.matrix import matrix
from tests.model.ops.triton.inputs import (
    ALL_FORMS,
    EPSILON,
    FORMS,
    PAPER,
    Input,
    gradients,
    make,
    outputs,
    upstream,
)

pytestmark = KERNELS

LENGTHS = (1, 63, 64, 65, 127, 129, 1000)
SMALL = Cut(segment=64, block=32)
"""Several segments, and blocks in each, in few tokens."""

EXACT, ROUNDED = (torch.float32, 1e-5, 1e-4), (torch.bfloat16, 1e-2, 2e-2)
TOLERANCES = pytest.mark.parametrize(("dtype", "tolerance", "of_gradients"), [EXACT, ROUNDED])


def exact(form: str, x: Input, *, normalize: bool) -> tuple[Tensor, ...]:
    """The definition, of one document of one row."""
    q, k = (functional.rms_norm(y[0], y.shape[-1:], eps=1e-6) for y in (x.q, x.k))
    if not normalize:
        q, k = x.q[0], x.k[0]
    gamma_q, gamma_k = (reference.responsibilities(y, x.mu, x.var, x.log_pi) for y in (q, k))
    state = x.memory[0], x.mass[0]
    if form == "causal":
        found = reference.causal(gamma_q, gamma_k, x.val[0], *state, epsilon=EPSILON)
    else:
        found = reference.forgetting(
            gamma_q, gamma_k, x.val[0], x.log_keep[0], *state, epsilon=EPSILON
        )
    return tuple(y[None] for y in found)


@pytest.mark.usefixtures("_poisoned")
@TOLERANCES
@pytest.mark.parametrize(
    ("tokens", "normalize"),
    [
        *((tokens, True) for tokens in LENGTHS if tokens != 127),
        (65, False),
        *(
            pytest.param(tokens, False, marks=pytest.mark.long)
            for tokens in LENGTHS
            if tokens != 65
        ),
    ],
)
@pytest.mark.parametrize("form", ["causal", pytest.param("forgetting", marks=pytest.mark.gpu)])
def test_operation_is_its_definition(
    form: str,
    tokens: int,
    normalize: bool,
    dtype: torch.dtype,
    tolerance: float,
    of_gradients: float,
) -> None:
    cut = SMALL if tokens < 1000 else Cut(segment=256, block=64)
    made, rows = make([tokens], [0])
    x = made.to(dtype)
    rounded = x.to(torch.float64)
    found = outputs(form, operators, x, rows, normalize=normalize, cut=cut)
    expected = exact(form, rounded, normalize=normalize)
    for mine, definition in zip(found, expected, strict=True):
        assert error(mine, definition) <= tolerance
    d_found = upstream(found)
    assert_close(gradients(found, x, d_found), gradients(expected, rounded, d_found), of_gradients)


@pytest.mark.usefixtures("_poisoned")
@TOLERANCES
def test_forgetting_is_its_definition(
    dtype: torch.dtype, tolerance: float, of_gradients: float
) -> None:
    test_operation_is_its_definition("forgetting", 129, True, dtype, tolerance, of_gradients)


def compare(
    form: str,
    exact: Input,
    rows: Rows,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
    of_gradients: float = 1e-4,
    *,
    change: Callable[[Input], Input] = lambda x: x,
    **cut: Any,
) -> None:
    """Outputs where tokens are and all gradients, against the chunked form in float64.

    ``change`` gives what the kernels get in the place of these inputs.
    """
    x = exact.to(dtype)
    rounded = x.to(torch.float64)
    found = outputs(form, operators, change(x), rows, **cut)
    expected = outputs(form, CHUNKED, rounded, rows)
    d_found = upstream(expected)
    d_poisoned = [y.clone() for y in d_found]
    if "write" not in form:
        assert not found[0][~rows.valid].any()
        found = (found[0], *found[1:])
        expected = (expected[0].masked_fill(~rows.valid[..., None, None], 0.0), *expected[1:])
        d_poisoned[0][~rows.valid] = torch.nan
    for mine, definition in zip(found, expected, strict=True):
        assert error(mine, definition) <= tolerance
    found_gradients = gradients(found, x, d_poisoned)
    assert_close(found_gradients, gradients(expected, rounded, d_found), of_gradients)


def assert_close(found: Input, expected: Input, tolerance: float) -> None:
    for name, mine, definition in zip(Input._fields, found, expected, strict=True):
        assert error(mine, definition) <= tolerance, name


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(
    ("form", "tolerances"),
    matrix(
        [*PAPER, "forgetting"],
        [EXACT, ROUNDED],
        always=[("causal", EXACT), ("write", ROUNDED), ("read", EXACT), ("forgetting", ROUNDED)],
    ),
)
def test_documents_side_by_side(form: str, tolerances: tuple[torch.dtype, float, float]) -> None:
    """Several rows each, ragged last ones, unused ones, and a document that has none."""
    lengths, documents = [130, 130, 5, 0, 130, 64, 0], [0, 0, 0, 4, 1, 3, 4]
    exact, rows = make(lengths, documents, sizes=(16, 16, 16), states=5)

    def poison(x: Input) -> Input:
        """NaN where no token is."""
        with torch.no_grad():
            for y in (x.q, x.k, x.val, x.log_keep):
                y[~rows.valid] = torch.nan
        return x

    compare(form, exact, rows, *tolerances, change=poison, cut=SMALL)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.long)]
)
@FORMS
def test_a_document_is_alone(form: str, dtype: torch.dtype) -> None:
    """NaN in one document, and in a state of none, changes nothing of others', backward either."""
    exact, rows = make([70, 70, 40, 0], [0, 1, 2, 3])

    def run(changed: bool) -> list[Tensor]:
        x = exact.to(dtype)
        with torch.no_grad():
            if changed:
                x.q[0, 3], x.k[0, 5], x.val[0, 7] = torch.nan, torch.nan, torch.nan
                x.memory[0], x.mass[3] = torch.nan, torch.nan
        found = outputs(form, operators, x, rows, cut=SMALL)
        d_found = upstream(found)
        for d in d_found:
            d[0] = torch.nan if changed else 0.0
        d_x = gradients(found, x, d_found)
        return [y[1:3] for y in (*found, *d_x[:3], d_x.memory, d_x.mass)]

    for before, after in zip(run(False), run(True), strict=True):
        assert before.isfinite().all()
        assert torch.equal(before, after)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("sizes", [(128, 16, 32), (32, 128, 16), (16, 32, 128)])
@FORMS
def test_sizes(form: str, sizes: tuple[int, int, int]) -> None:
    compare(form, *make([40, 20], [0, 1], sizes=sizes), cut=Cut(segment=32, block=16))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", list(itertools.product((16, 32, 64, 128), repeat=3)))
@ALL_FORMS
def test_sizes_as_they_are_cut(form: str, sizes: tuple[int, int, int]) -> None:
    """Whole blocks and a tail, in the tiles that a device multiplies by: interpreted it would be
    slow, and say nothing.

    Gradients multiply bfloat16's rounding by the inverse of a variance or a mass. So none is near 0
    here, as some are where float32 is tested.
    """
    x, rows = make([300, 133], [0, 1], sizes=sizes, heads=2)
    x = x._replace(var=x.var.clamp_min(0.5), mass=x.mass.clamp_min(1.0))
    compare(form, x, rows, *ROUNDED)


@FORMS
def test_gradients_after_many_tokens(form: str) -> None:
    """Components' means are nearly one and the same, and their differences still count."""
    exact, rows = make([100], [0])
    mass = exact.mass * 1e4
    exact = exact._replace(mass=mass, memory=mass[..., None] * (0.5 + exact.val[0, :16, 0] * 0.05))
    compare(form, exact, rows, torch.bfloat16, 1e-2, 1e-2, cut=SMALL)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("form", ["causal", "forgetting"])
def test_gradients_of_one_output_alone(form: str, part: int) -> None:
    exact, rows = make([40, 20], [0, 1])
    x = exact.to(torch.float32)
    rounded = x.to(torch.float64)

    def of_one(ops: Any, x: Input, **cut: Any) -> Input:
        alone = outputs(form, ops, x, rows, **cut)[part]
        if part == 0:
            alone = alone.masked_fill(~rows.valid[..., None, None], 0.0)
        return Input(*torch.autograd.grad(alone.square().sum(), x, materialize_grads=True))

    assert_close(of_one(operators, x, cut=SMALL), of_one(CHUNKED, rounded), 1e-4)


@pytest.mark.usefixtures("_poisoned")
@FORMS
def test_chosen_cut(form: str) -> None:
    compare(form, *make([70, 9], [0, 1], heads=2))


@FORMS
def test_strided(form: str) -> None:
    """Parts of one projection, heads before tokens, and a last dimension that is not dense."""

    def change(x: Input) -> Input:
        both = torch.cat([x.q, x.val], -1)
        return x._replace(
            q=both[..., : x.q.shape[-1]],
            val=both[..., x.q.shape[-1] :],
            k=x.k.transpose(1, 2).contiguous().transpose(1, 2),
            memory=torch.stack([x.memory, x.memory], 1)[:, 1],
            mass=x.mass.mT.contiguous().mT,
        )

    exact, rows = make([70, 5], [0, 1], heads=3)
    compare(form, exact, rows, change=change, cut=SMALL)


@pytest.mark.parametrize("changed", [0, 31, 32, 64, 129])
def test_causality(changed: int) -> None:
    exact, rows = make([130], [0])
    x, y = exact.to(torch.float32), exact.to(torch.float32)
    with torch.no_grad():
        y.k[0, changed] += 1.0
        y.val[0, changed] -= 1.0
    before, after = (outputs("causal", operators, z, rows, cut=SMALL)[0] for z in (x, y))
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).flatten(2).any(2).all()
    # No output before the token has a gradient in it.
    d_k, d_val = torch.autograd.grad(before[:, :changed].sum(), [x.k, x.val])
    assert not d_k[:, changed:].any()
    assert not d_val[:, changed:].any()


def taken(form: str) -> tuple[Any, ...]:
    """What the form's operator takes."""
    exact, rows = make([16, 9], [0, 0], states=1)
    x = exact.to(torch.float32)
    mixture = [y.detach().requires_grad_() for y in Coefficients.of(x.mu, x.var, x.log_pi)]
    tokens_and_state: dict[str, list[Tensor]] = {
        "causal": [x.q, x.k, x.val, x.memory, x.mass],
        "write": [x.k, x.val],
        "read": [x.q, x.memory, x.mass],
    }
    kept: dict[str, list[Tensor | None]] = {"causal": [None], "forgetting": [x.log_keep]}
    where = [rows.lengths, rows.document, rows.first, rows.count]
    operator = operator_of(form)
    if operator == "causal":
        del where[1]
    settings = [True] if operator == "write" else [True, EPSILON]
    cut = list(Cut(segment=16, block=16))
    return (*tokens_and_state[operator], *mixture, *kept.get(form, []), *where, *settings, cut)


def operator_of(form: str) -> str:
    return "causal" if form == "forgetting" else form


@ALL_FORMS
def test_operator_is_sound(form: str) -> None:
    torch.library.opcheck(getattr(torch.ops.gma, operator_of(form)).default, taken(form))


@FORMS
def test_compiled(form: str) -> None:
    exact, rows = make([40, 20], [0, 1])

    def loss(x: Input) -> Tensor:
        found = outputs(form, operators, x, rows, cut=SMALL)
        return torch.stack([y.square().sum() for y in found]).sum()

    x, y = exact.to(torch.float32), exact.to(torch.float32)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = Input(*torch.autograd.grad(compiled(x), x, materialize_grads=True))
    expected = Input(*torch.autograd.grad(loss(y), y, materialize_grads=True))
    assert_close(found, expected, 1e-6)


@FORMS
def test_no_second_derivative(form: str) -> None:
    exact, rows = make([20], [0])
    x = exact.to(torch.float32)
    found = outputs(form, operators, x, rows, cut=SMALL)[0]
    x = x._replace(q=x.k) if form == "write" else x
    (d_q,) = torch.autograd.grad(found.square().sum(), x.q, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(d_q.sum(), x.q)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    """A document that repeats itself: its last part, from the sum of the earlier ones."""
    heads, width, part = 8, 16, 1 << 12
    repeats = (1 << 31) // (heads * width * part) + 1
    exact, rows = make([part], [0], heads=heads, sizes=(width, width, width))
    exact = exact._replace(memory=exact.memory * 0.0, mass=exact.mass * 0.0)
    x = exact.to(torch.bfloat16)
    rounded = x.to(torch.float64)
    memory, mass = outputs("write", CHUNKED, rounded, rows)
    earlier = repeats - 1
    end = rounded._replace(
        memory=(memory * earlier).detach().requires_grad_(),
        mass=(mass * earlier).detach().requires_grad_(),
    )
    expected = outputs("causal", CHUNKED, end, rows)
    d_out = upstream(expected)[0]
    d_end = torch.autograd.grad(expected[0], [end.q, end.k, end.val], d_out)
    q, k, val = (y.detach().repeat(1, repeats, 1, 1).requires_grad_() for y in (x.q, x.k, x.val))
    length = torch.tensor([part * repeats], device=DEVICE)
    rows = Rows.of(length, torch.tensor([0], device=DEVICE), part * repeats, torch.float32)
    assert q.numel() > 1 << 31
    found = outputs("causal", operators, x._replace(q=q, k=k, val=val), rows)[0]
    assert error(found[:, -part:], expected[0]) <= 1e-2
    d_found = torch.autograd.grad(
        found, [q, k, val], d_out.to(torch.bfloat16).repeat(1, repeats, 1, 1)
    )
    for mine, definition in zip(d_found, d_end, strict=True):
        assert error(mine[:, -part:], definition) <= 2e-2
