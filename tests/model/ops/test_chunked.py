"""The chunked operation against its definition, and the properties that the definition has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gma.model.ops import chunked, reference
from gma.model.ops.chunked import Coefficients
from tests.model.ops.inputs import EPSILON, Input, bidirectional, causal, make, normalized, one_row
from tests.model.small import error

LENGTHS = (1, 63, 64, 65, 127, 128, 129, 1000)

TOLERANCES = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 2e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)],
)


@TOLERANCES
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_causal_is_its_definition(
    tokens: int, normalize: bool, dtype: torch.dtype, tolerance: float
) -> None:
    exact = make(tokens)
    found = causal(exact.to(dtype), normalize=normalize)
    # Of the rounded input: how far rounding a query moves its posterior is not the operation's.
    rounded = exact.to(dtype).to(torch.float64)
    if normalize:
        rounded = rounded._replace(q=normalized(rounded.q), k=normalized(rounded.k))
    expected = reference.causal(
        *rounded.gammas(), rounded.val, rounded.memory, rounded.mass, epsilon=EPSILON
    )
    for mine, definition in zip(found, expected, strict=True):
        assert error(mine, definition) <= tolerance


@TOLERANCES
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_bidirectional_is_its_definition(
    tokens: int, normalize: bool, dtype: torch.dtype, tolerance: float
) -> None:
    exact = make(tokens)
    rounded = exact.to(dtype).to(torch.float64)
    if normalize:
        rounded = rounded._replace(q=normalized(rounded.q), k=normalized(rounded.k))
    expected = reference.bidirectional(*rounded.gammas(), rounded.val, epsilon=EPSILON)
    assert error(bidirectional(exact.to(dtype), normalize=normalize), expected) <= tolerance


def test_definition_token_by_token() -> None:
    """The reference itself, against the sums as the paper writes them."""
    x = make(9)
    gamma_q, gamma_k = x.gammas()
    out, memory, mass = reference.causal(gamma_q, gamma_k, x.val, x.memory, x.mass, epsilon=EPSILON)
    for head in range(2):
        mu, var, log_pi = (part[head] for part in x.mixture)
        normal = torch.exp(-(x.q[:, head, None] - mu).square() / (2 * var))
        density = (normal / (2 * torch.pi * var).sqrt()).prod(-1)
        joint = log_pi + density.log()
        torch.testing.assert_close(gamma_q[:, head], torch.softmax(joint, -1))
        memory_i, mass_i = x.memory[head].clone(), x.mass[head].clone()
        for i in range(9):
            memory_i += torch.outer(gamma_k[i, head], x.val[i, head])
            mass_i += gamma_k[i, head]
            read = gamma_q[i, head] @ memory_i / (gamma_q[i, head] @ mass_i + EPSILON)
            torch.testing.assert_close(out[i, head], read)
        torch.testing.assert_close(memory[head], memory_i)
        torch.testing.assert_close(mass[head], mass_i)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_responsibilities_are_a_posterior(implementation: str) -> None:
    x = make(300)
    far = x.q * 1e3  # one component has all of it, and no score overflows
    for tokens in (x.q, far, torch.zeros_like(x.q)):
        if implementation == "reference":
            gamma = reference.responsibilities(tokens, *x.mixture)
        else:
            mixture = Coefficients.of(*x.mixture)
            gamma = chunked.responsibilities(tokens[None], mixture, normalize=False)[0]
        assert (gamma >= 0).all()
        torch.testing.assert_close(gamma.sum(-1), torch.ones_like(gamma.sum(-1)))


def test_scores_of_bfloat16_are_float32() -> None:
    x = make(10).to(torch.bfloat16)
    gamma = chunked.responsibilities(x.q[None], Coefficients.of(*x.mixture), normalize=True)
    assert gamma.dtype == torch.float32


def test_affinity_is_non_negative_and_of_low_rank() -> None:
    gamma_q, gamma_k = make(200).gammas()
    for head in range(2):
        affinity = gamma_q[:, head] @ gamma_k[:, head].T
        assert (affinity >= 0).all()
        assert torch.linalg.matrix_rank(affinity) <= 7


@pytest.mark.parametrize("form", ["causal", "bidirectional"])
def test_output_is_a_weighted_mean_of_the_values_seen(form: str) -> None:
    x = make(500)
    x = x._replace(memory=torch.zeros_like(x.memory), mass=torch.zeros_like(x.mass))
    # Values on a circle, then each output is in the disc, and in the range of what it has seen.
    angle = x.val[..., 0] * 6.0
    x = x._replace(val=torch.stack([angle.cos(), angle.sin()], -1), memory=x.memory[..., :2])
    out = causal(x)[0] if form == "causal" else bidirectional(x)
    assert (out.norm(dim=-1) <= 1.0).all()
    if form == "causal":
        low, high = x.val.cummin(0).values, x.val.cummax(0).values
    else:
        low, high = x.val.amin(0), x.val.amax(0)
    # Divided by the mass and a little more: a little towards zero of the hull.
    slack = 1e-4
    assert (out >= low - slack).all()
    assert (out <= high + slack).all()
    ones = x._replace(val=torch.ones_like(x.val))
    mean = causal(ones)[0] if form == "causal" else bidirectional(ones)
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("changed", [0, 1, 63, 64, 150, 299])
def test_causality(changed: int) -> None:
    x = make(300)
    before = causal(x)[0]
    k, val = x.k.clone(), x.val.clone()
    k[changed] += 1.0
    val[changed] -= 1.0
    after = causal(x._replace(k=k, val=val))[0]
    assert torch.equal(before[:changed], after[:changed])
    assert (before[changed:] != after[changed:]).flatten(1).any(1).all()


def test_ten_million_tokens() -> None:
    """A float32 state, summed chunk by chunk, against float64 sums of float64 chunks."""
    chunk, distinct = 4096, 8
    pieces = [make(chunk + i, heads=1, r=2, components=4, v=2) for i in range(distinct)]
    pieces = [piece._replace(mixture=pieces[0].mixture) for piece in pieces]

    def write(piece: Input, dtype: torch.dtype) -> Tensor:
        x = piece.to(dtype)
        memory, mass = chunked.write(
            x.k[None],
            x.val[None],
            Coefficients.of(*x.mixture),
            one_row(len(x.k), dtype),
            normalize=False,
        )
        return torch.cat([memory[0], mass[0, ..., None]], -1)

    single = [write(piece, torch.float32) for piece in pieces]
    double = [write(piece, torch.float64) for piece in pieces]
    state, exact = torch.zeros_like(single[0]), torch.zeros_like(double[0])
    tokens = 0
    for i in range(2445):
        state, exact = state + single[i % distinct], exact + double[i % distinct]
        tokens += len(pieces[i % distinct].k)
    assert tokens > 10_000_000
    assert error(state, exact) <= 1e-5
    assert abs(float(exact[..., -1].sum()) - tokens) <= 1e-9 * tokens
