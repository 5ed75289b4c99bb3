"""Steps for the operation in Triton, its outputs and its gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gma.model.ops.chunked import Coefficients, Rows
from gma.model.ops.forgetting import MOST_FORGOTTEN

pytest.importorskip("triton")

from tests.interpreting import DEVICE

EPSILON = 1e-6

PAPER = ["causal", "write", "read"]
ALL_FORMS = pytest.mark.parametrize("form", [*PAPER, "forgetting"])
# Forgetting is the same kernels with one factor more, and interpreted slowly.
FORMS = pytest.mark.parametrize("form", [*PAPER, pytest.param("forgetting", marks=pytest.mark.gpu)])


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
    log_keep: Tensor  # (R, C, H)

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
        # Tokens that forget as much as they may, a little, and nothing.
        -(normal(len(lengths), chunk, heads) * 0.2).clamp(0.0, MOST_FORGOTTEN),
    )
    return x, Rows(*(part.to(DEVICE) for part in rows))


def outputs(
    form: str, ops: Any, x: Input, rows: Rows, *, normalize: bool = True, **cut: Any
) -> tuple[Tensor, ...]:
    """What a form of the operation gives; tokens first, then memory and mass."""
    mixture = Coefficients.of(x.mu, x.var, x.log_pi)
    state = x.memory, x.mass
    settings: dict[str, Any] = {"normalize": normalize, **cut}
    found: Any
    if form == "causal":
        found = ops.causal(x.q, x.k, x.val, *state, mixture, rows, epsilon=EPSILON, **settings)
    elif form == "forgetting":
        found = ops.forgetting(
            x.q, x.k, x.val, *state, mixture, x.log_keep, rows, epsilon=EPSILON, **settings
        )
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
