"""The form that forgets against its definition, and the properties that the definition has."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gma.model.ops import forgetting, reference
from gma.model.ops.chunked import Coefficients
from gma.model.ops.forgetting import MOST_FORGOTTEN
from tests.model.ops.inputs import EPSILON, Input, make, one_row
from tests.model.small import error

LENGTHS = (1, 2, 63, 64, 65, 129, 1000)


class Decaying(NamedTuple):
    """One document: what `make` gives, and log_keep (N, H) in float64."""

    x: Input
    log_keep: Tensor


def decaying(tokens: int, rate: float | None = None) -> Decaying:
    """One in which every token forgets at this rate; without, at all there are, also at none."""
    generator = torch.Generator().manual_seed(tokens)
    x = make(tokens)
    drawn = torch.rand(tokens, 2, generator=generator, dtype=torch.float64)
    rates = (drawn * 1.5 - 0.25).clamp(0.0, 1.0) * MOST_FORGOTTEN
    return Decaying(x, -(rates if rate is None else torch.full_like(rates, rate)))


def exact(given: Decaying) -> tuple[Tensor, Tensor, Tensor]:
    x = given.x
    return reference.forgetting(
        *x.gammas(), x.val, given.log_keep, x.memory, x.mass, epsilon=EPSILON
    )


def causal(given: Decaying) -> tuple[Tensor, Tensor, Tensor]:
    """The chunked form on one row."""
    x = given.x
    out, memory, mass = forgetting.causal(
        x.q[None],
        x.k[None],
        x.val[None],
        x.memory[None],
        x.mass[None],
        Coefficients.of(*x.mixture),
        given.log_keep[None],
        one_row(len(x.q), x.memory.dtype),
        normalize=False,
        epsilon=EPSILON,
    )
    return out[0], memory[0], mass[0]


@pytest.mark.parametrize("rate", [None, 0.0, 1e-7, MOST_FORGOTTEN])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 2e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)],
)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_it_is_its_definition(
    tokens: int, dtype: torch.dtype, tolerance: float, rate: float | None
) -> None:
    given = decaying(tokens, rate)
    found = causal(given._replace(x=given.x.to(dtype)))
    expected = exact(given._replace(x=given.x.to(dtype).to(torch.float64)))
    for mine, definition in zip(found, expected, strict=True):
        assert error(mine, definition) <= tolerance


def test_the_definition_token_by_token() -> None:
    x, log_keep = given = decaying(9)
    gamma_q, gamma_k = x.gammas()
    out, memory, mass = exact(given)
    for head in range(2):
        memory_i, mass_i = x.memory[head].clone(), x.mass[head].clone()
        for i in range(9):
            kept, written = log_keep[i, head].exp(), gamma_k[i, head]
            memory_i = kept * memory_i + torch.outer(written, x.val[i, head])
            mass_i = kept * mass_i + written
            read = gamma_q[i, head] @ memory_i / (gamma_q[i, head] @ mass_i + EPSILON)
            torch.testing.assert_close(out[i, head], read)
        torch.testing.assert_close(memory[head], memory_i)
        torch.testing.assert_close(mass[head], mass_i)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_who_forgets_nothing_is_the_paper_s_form(tokens: int) -> None:
    x = make(tokens)
    neutral = Decaying(x, torch.zeros(tokens, 2).double())
    paper = reference.causal(*x.gammas(), x.val, x.memory, x.mass, epsilon=EPSILON)
    for mine, definition in zip(exact(neutral), paper, strict=True):
        assert error(mine, definition) <= 1e-14
    for mine, definition in zip(causal(neutral), paper, strict=True):
        assert error(mine, definition) <= 2e-12


@pytest.mark.parametrize("implementation", [exact, causal])
def test_an_output_is_a_weighted_mean_of_the_values_seen(implementation: object) -> None:
    assert callable(implementation)
    given = decaying(500)
    angle = given.x.val[..., 0] * 6.0
    x = given.x._replace(
        val=torch.stack([angle.cos(), angle.sin()], -1),
        memory=torch.zeros_like(given.x.memory[..., :2]),
        mass=torch.zeros_like(given.x.mass),
    )
    out = implementation(given._replace(x=x))[0]
    assert (out.norm(dim=-1) <= 1.0).all()
    # Divided by the mass and a little more: a little towards zero of the hull.
    assert (out >= x.val.cummin(0).values - 1e-3).all()
    assert (out <= x.val.cummax(0).values + 1e-3).all()


@pytest.mark.parametrize("changed", [0, 1, 63, 64, 150, 299])
def test_causality(changed: int) -> None:
    given = decaying(300)
    before = causal(given)[0]
    k, log_keep = given.x.k.clone(), given.log_keep.clone()
    k[changed] += 1.0
    log_keep[changed] = -0.1
    after = causal(Decaying(given.x._replace(k=k), log_keep))[0]
    assert torch.equal(before[:changed], after[:changed])
    assert (before[changed] != after[changed]).any()


def test_what_is_forgotten_wholly_leaves_nothing_behind() -> None:
    """What a state held decays beyond what float32 holds, and was large: values of 1e30."""
    given = decaying(1000, MOST_FORGOTTEN)
    x = given.x._replace(memory=given.x.memory * 1e30, mass=given.x.mass * 1e30)
    for dtype in (torch.float32, torch.float64):
        found = causal(given._replace(x=x.to(dtype)))
        assert all(y.isfinite().all() for y in found)
        expected = exact(given._replace(x=x))
        assert error(found[1], expected[1]) <= 1e-5
        assert error(found[0][500:], expected[0][500:]) <= 1e-5


@pytest.mark.parametrize("half_life", [100.0, 1e5])
def test_ten_million_tokens(half_life: float) -> None:
    """A float32 state against one in float64, of rows of four kinds, one after the other."""
    chunk, distinct = 4096, 4
    rate = torch.log(torch.tensor(2.0)).item() / half_life

    def decay_and_sums(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        given = decaying(tokens, rate)
        x = given.x.to(dtype)
        x = x._replace(memory=torch.zeros_like(x.memory), mass=torch.zeros_like(x.mass))
        _, memory, mass = causal(given._replace(x=x))
        kept = given.log_keep.sum(0).exp().to(dtype)
        return kept[:, None, None], torch.cat([memory, mass[..., None]], -1)

    single, double = (
        [decay_and_sums(chunk + i, dtype) for i in range(distinct)]
        for dtype in (torch.float32, torch.float64)
    )
    state, expected = torch.zeros_like(single[0][1]), torch.zeros_like(double[0][1])
    for i in range(2445):
        kept, sums = single[i % distinct]
        state = kept * state + sums
        kept, sums = double[i % distinct]
        expected = kept * expected + sums
    assert 2445 * chunk > 10_000_000
    assert error(state, expected) <= 1e-5
