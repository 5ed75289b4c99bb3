"""The operation in Triton, forward and backward, against float64: interpreted where no GPU is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gma.model.ops import chunked, reference
from gma.model.ops.chunked import Coefficients, Rows
from tests.model.small import error

pytest.importorskip("triton")

from gma.model.ops import triton
from gma.model.ops.triton import Plan
from tests.interpreting import DEVICE, KERNELS

pytestmark = KERNELS

EPSILON = 1e-6
LENGTHS = (1, 63, 64, 65, 127, 129, 1000)
SMALL = Plan(segment=64, block=32)
"""Several segments, and blocks in each, in few tokens."""

TOLERANCES = pytest.mark.parametrize(
    ("dtype", "tolerance", "of_gradients"),
    [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 1e-2, 2e-2)],
)
FORMS = pytest.mark.parametrize("form", ["causal", "write", "read"])


class Input(NamedTuple):
    """A step: R rows of C tokens, D documents, H heads, r, K, v."""

    q: Tensor  # (R, C, H, r)
    k: Tensor
    val: Tensor  # (R, C, H, v)
    mu: Tensor  # (H, K, r)
    var: Tensor
    log_pi: Tensor  # (H, K)
    memory: Tensor  # (D, H, K, v)
    mass: Tensor  # (D, H, K)

    def to(self, dtype: torch.dtype) -> Input:
        """Tokens in this dtype; mixture and state in at least float32. Leaves of a new graph."""
        least = torch.promote_types(dtype, torch.float32)
        moved = [x.to(DEVICE, dtype if i < 3 else least) for i, x in enumerate(self)]
        return Input(*(x.detach().clone().requires_grad_() for x in moved))


def make(
    lengths: list[int],
    documents: list[int],
    *,
    chunk: int | None = None,
    heads: int = 1,
    sizes: tuple[int, int, int] = (16, 16, 32),
    states: int | None = None,
) -> tuple[Input, Rows]:
    """Float64, with states that were written to; as many documents as rows unless it is said."""
    chunk = chunk or max(lengths)
    r, components, v = sizes
    generator = torch.Generator().manual_seed(sum(lengths))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = Rows.of(torch.tensor(lengths), torch.tensor(documents), chunk, torch.float64)
    states = states or len(lengths)
    rows = rows._replace(
        first=rows.first[:states], count=rows.count[:states], belongs=rows.belongs[:states]
    )
    mass = normal(states, heads, components).abs() * 10
    x = Input(
        normal(len(lengths), chunk, heads, r),
        normal(len(lengths), chunk, heads, r),
        normal(len(lengths), chunk, heads, v) + 0.5,
        normal(heads, components, r),
        normal(heads, components, r).exp() + 0.1,
        torch.log_softmax(normal(heads, components), -1),
        normal(states, heads, components, v) * mass[..., None],
        mass,
    )
    return x, Rows(*(part.to(DEVICE) for part in rows))


def outputs(
    form: str, ops: Any, x: Input, rows: Rows, *, normalize: bool = True, **plan: Any
) -> tuple[Tensor, ...]:
    """What a form of the operation gives; tokens first, then memory and mass."""
    mixture = Coefficients.of(x.mu, x.var, x.log_pi)
    state = x.memory, x.mass
    settings: dict[str, Any] = {"normalize": normalize, **plan}
    found: Any
    if form == "causal":
        found = ops.causal(x.q, x.k, x.val, *state, mixture, rows, epsilon=EPSILON, **settings)
    elif form == "write":
        found = ops.write(x.k, x.val, mixture, rows, **settings)
    else:
        found = (ops.read(x.q, *state, mixture, rows, epsilon=EPSILON, **settings),)
    return tuple(found)


def upstream(found: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of outputs, always the same."""
    generator = torch.Generator().manual_seed(0)
    normal = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in found]
    return [x.to(DEVICE) for x in normal]


def gradients(found: tuple[Tensor, ...], x: Input, d_found: list[Tensor]) -> Input:
    """Zeros for what the form does not take."""
    d_found = [d.to(y.dtype) for d, y in zip(d_found, found, strict=True)]
    return Input(*torch.autograd.grad(found, x, d_found, materialize_grads=True))


def exact_causal(x: Input, *, normalize: bool) -> tuple[Tensor, ...]:
    """The definition, of one document of one row."""
    q, k = (functional.rms_norm(y[0], y.shape[-1:], eps=1e-6) for y in (x.q, x.k))
    if not normalize:
        q, k = x.q[0], x.k[0]
    gamma_q, gamma_k = (reference.responsibilities(y, x.mu, x.var, x.log_pi) for y in (q, k))
    found = reference.causal(gamma_q, gamma_k, x.val[0], x.memory[0], x.mass[0], epsilon=EPSILON)
    return tuple(y[None] for y in found)


@pytest.mark.usefixtures("_poisoned")
@TOLERANCES
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_causal_is_its_definition(
    tokens: int, normalize: bool, dtype: torch.dtype, tolerance: float, of_gradients: float
) -> None:
    plan = SMALL if tokens < 1000 else Plan(segment=256, block=64)
    exact, rows = make([tokens], [0])
    x = exact.to(dtype)
    rounded = x.to(torch.float64)
    found = outputs("causal", triton, x, rows, normalize=normalize, plan=plan)
    expected = exact_causal(rounded, normalize=normalize)
    for mine, definition in zip(found, expected, strict=True):
        assert error(mine, definition) <= tolerance
    d_found = upstream(found)
    assert_close(gradients(found, x, d_found), gradients(expected, rounded, d_found), of_gradients)


def compare(
    form: str,
    exact: Input,
    rows: Rows,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
    of_gradients: float = 1e-4,
    *,
    change: Callable[[Input], Input] = lambda x: x,
    **plan: Any,
) -> None:
    """Outputs where tokens are and all gradients, against the chunked form in float64.

    ``change`` gives what the kernels get in the place of these inputs.
    """
    x = exact.to(dtype)
    rounded = x.to(torch.float64)
    found = outputs(form, triton, change(x), rows, **plan)
    expected = outputs(form, chunked, rounded, rows)
    d_found = upstream(expected)
    d_poisoned = [y.clone() for y in d_found]
    if form != "write":
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
@TOLERANCES
@FORMS
def test_documents_side_by_side(
    form: str, dtype: torch.dtype, tolerance: float, of_gradients: float
) -> None:
    """Several rows each, ragged last ones, unused ones, and a document that has none."""
    lengths, documents = [130, 130, 5, 0, 130, 64, 0], [0, 0, 0, 4, 1, 3, 4]
    exact, rows = make(lengths, documents, sizes=(16, 16, 16), states=5)

    def poison(x: Input) -> Input:
        """NaN where no token is."""
        with torch.no_grad():
            for y in (x.q, x.k, x.val):
                y[~rows.valid] = torch.nan
        return x

    compare(form, exact, rows, dtype, tolerance, of_gradients, change=poison, plan=SMALL)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
        found = outputs(form, triton, x, rows, plan=SMALL)
        d_found = upstream(found)
        for d in d_found:
            d[0] = torch.nan if changed else 0.0
        d_x = gradients(found, x, d_found)
        return [y[1:3] for y in (*found, *d_x[:3], d_x.memory, d_x.mass)]

    for before, after in zip(run(False), run(True), strict=True):
        assert before.isfinite().all()
        assert torch.equal(before, after)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(
    "sizes", [(128, 16, 32), (32, 128, 16), (16, 32, 128), (64, 64, 64), (32, 16, 128)]
)
@FORMS
def test_sizes(form: str, sizes: tuple[int, int, int]) -> None:
    compare(form, *make([40, 20], [0, 1], sizes=sizes), plan=Plan(segment=32, block=16))


@FORMS
def test_gradients_after_many_tokens(form: str) -> None:
    """Components' means are nearly one and the same, and their differences still count."""
    exact, rows = make([100], [0])
    mass = exact.mass * 1e4
    exact = exact._replace(mass=mass, memory=mass[..., None] * (0.5 + exact.val[0, :16, 0] * 0.05))
    compare(form, exact, rows, torch.bfloat16, 1e-2, 1e-2, plan=SMALL)


@pytest.mark.usefixtures("_poisoned")
@FORMS
def test_chosen_plan(form: str) -> None:
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
    compare(form, exact, rows, change=change, plan=SMALL)


@pytest.mark.parametrize("changed", [0, 31, 32, 64, 129])
def test_causality(changed: int) -> None:
    exact, rows = make([130], [0])
    x, y = exact.to(torch.float32), exact.to(torch.float32)
    with torch.no_grad():
        y.k[0, changed] += 1.0
        y.val[0, changed] -= 1.0
    before, after = (outputs("causal", triton, z, rows, plan=SMALL)[0] for z in (x, y))
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).flatten(2).any(2).all()
    # No output before the token has a gradient in it.
    d_k, d_val = torch.autograd.grad(before[:, :changed].sum(), [x.k, x.val])
    assert not d_k[:, changed:].any()
    assert not d_val[:, changed:].any()


def arguments(form: str) -> tuple[Any, ...]:
    """What the form's operator takes."""
    exact, rows = make([40, 20], [0, 0], states=1)
    x = exact.to(torch.float32)
    mixture = [y.detach().requires_grad_() for y in Coefficients.of(x.mu, x.var, x.log_pi)]
    tokens_and_state: dict[str, list[Tensor]] = {
        "causal": [x.q, x.k, x.val, x.memory, x.mass],
        "write": [x.k, x.val],
        "read": [x.q, x.memory, x.mass],
    }
    where = [rows.lengths, rows.document, rows.first, rows.count]
    if form == "causal":
        del where[1]
    settings = [True] if form == "write" else [True, EPSILON]
    return (*tokens_and_state[form], *mixture, *where, *settings, list(Plan(segment=32, block=16)))


@FORMS
def test_operator_is_sound(form: str) -> None:
    torch.library.opcheck(getattr(torch.ops.gma, form).default, arguments(form))


@FORMS
def test_compiled(form: str) -> None:
    exact, rows = make([40, 20], [0, 1])

    def loss(x: Input) -> Tensor:
        found = outputs(form, triton, x, rows, plan=SMALL)
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
    found = outputs(form, triton, x, rows, plan=SMALL)[0]
    x = x._replace(q=x.k) if form == "write" else x
    (d_q,) = torch.autograd.grad(found.square().sum(), x.q, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(d_q.sum(), x.q)


class TestRefuses:
    def test_a_device_without_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton, "INTERPRETED", False)
        exact, rows = make([20], [0])
        x, rows = Input(*(y.float().cpu() for y in exact)), Rows(*(y.cpu() for y in rows))
        with pytest.raises(ValueError, match="CUDA"):
            outputs("causal", triton, x, rows)

    @pytest.mark.parametrize("sizes", [(8, 16, 16), (16, 24, 16), (16, 16, 256)])
    @FORMS
    def test_sizes(self, form: str, sizes: tuple[int, int, int]) -> None:
        if (form, sizes) == ("write", (16, 16, 256)):
            sizes = (16, 256, 16)
        exact, rows = make([20], [0], sizes=sizes)
        with pytest.raises(ValueError, match="128"):
            outputs(form, triton, exact.to(torch.float32), rows)

    @FORMS
    def test_a_mixture_too_large_for_float32(self, form: str) -> None:
        exact, rows = make([20], [0], sizes=(128, 128, 16))
        with pytest.raises(ValueError, match=r"r \* K must be at most 8192"):
            outputs(form, triton, exact.to(torch.float32), rows)

    def test_dtypes(self) -> None:
        exact, rows = make([20], [0])
        with pytest.raises(ValueError, match="dtype"):
            outputs("causal", triton, exact.to(torch.float64), rows)
        x = exact.to(torch.bfloat16)
        with pytest.raises(ValueError, match="dtype"):
            outputs("causal", triton, x._replace(val=x.val.float()), rows)
        with pytest.raises(ValueError, match="float32"):
            outputs("causal", triton, x._replace(memory=x.memory.bfloat16()), rows)

    def test_shapes(self) -> None:
        exact, rows = make([20, 20], [0, 1], heads=2)
        x = exact.to(torch.float32)
        with pytest.raises(ValueError, match="mass is"):
            outputs("causal", triton, x._replace(mass=x.mass[:, :1]), rows)
        with pytest.raises(ValueError, match="contiguous"):
            outputs("causal", triton, x, rows._replace(lengths=rows.lengths.repeat(2)[::2]))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    """A document that repeats itself: its last part, from the sum of the earlier ones."""
    heads, width, part = 8, 16, 1 << 12
    repeats = (1 << 31) // (heads * width * part) + 1
    exact, rows = make([part], [0], heads=heads, sizes=(width, width, width))
    exact = exact._replace(memory=exact.memory * 0.0, mass=exact.mass * 0.0)
    x = exact.to(torch.bfloat16)
    rounded = x.to(torch.float64)
    memory, mass = outputs("write", chunked, rounded, rows)
    earlier = repeats - 1
    end = rounded._replace(
        memory=(memory * earlier).detach().requires_grad_(),
        mass=(mass * earlier).detach().requires_grad_(),
    )
    expected = outputs("causal", chunked, end, rows)
    d_out = upstream(expected)[0]
    d_end = torch.autograd.grad(expected[0], [end.q, end.k, end.val], d_out)
    q, k, val = (y.detach().repeat(1, repeats, 1, 1).requires_grad_() for y in (x.q, x.k, x.val))
    length = torch.tensor([part * repeats], device=DEVICE)
    rows = Rows.of(length, torch.tensor([0], device=DEVICE), part * repeats, torch.float32)
    assert q.numel() > 1 << 31
    found = outputs("causal", triton, x._replace(q=q, k=k, val=val), rows)[0]
    assert error(found[:, -part:], expected[0]) <= 1e-2
    d_found = torch.autograd.grad(
        found, [q, k, val], d_out.to(torch.bfloat16).repeat(1, repeats, 1, 1)
    )
    for mine, definition in zip(d_found, d_end, strict=True):
        assert error(mine[:, -part:], definition) <= 2e-2
