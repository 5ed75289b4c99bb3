"""The chunked operation against its definition, and the properties that the definition has."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gma.model.ops import chunked, reference
from gma.model.ops.chunked import Coefficients, Rows
from tests.model.small import error, small

EPSILON = 1e-6
LENGTHS = (1, 63, 64, 65, 127, 128, 129, 1000)


class Input(NamedTuple):
    """One document and one mixture, float64: N tokens, H heads, r, K, v."""

    q: Tensor  # (N, H, r)
    k: Tensor
    val: Tensor  # (N, H, v)
    mixture: tuple[Tensor, Tensor, Tensor]  # mu and var (H, K, r), log_pi (H, K)
    memory: Tensor  # (H, K, v)
    mass: Tensor  # (H, K)

    def gammas(self) -> tuple[Tensor, Tensor]:
        return (
            reference.responsibilities(self.q, *self.mixture),
            reference.responsibilities(self.k, *self.mixture),
        )

    def to(self, dtype: torch.dtype) -> Input:
        """Tokens in this dtype; mixture and state in at least float32."""
        least = torch.promote_types(dtype, torch.float32)
        mu, var, log_pi = (x.to(least) for x in self.mixture)
        return Input(
            self.q.to(dtype),
            self.k.to(dtype),
            self.val.to(dtype),
            (mu, var, log_pi),
            self.memory.to(least),
            self.mass.to(least),
        )


def make(tokens: int, heads: int = 2, r: int = 5, components: int = 7, v: int = 3) -> Input:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mass = normal(heads, components).abs() * 10
    mixture = (
        normal(heads, components, r),
        normal(heads, components, r).exp() + 0.01,
        torch.log_softmax(normal(heads, components), -1),
    )
    return Input(
        normal(tokens, heads, r),
        normal(tokens, heads, r),
        normal(tokens, heads, v) + 0.5,
        mixture,
        normal(heads, components, v) * mass[..., None],
        mass,
    )


def normalized(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def causal(x: Input, *, normalize: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The chunked form on one row."""
    out, memory, mass = chunked.causal(
        x.q[None],
        x.k[None],
        x.val[None],
        x.memory[None],
        x.mass[None],
        Coefficients.of(*x.mixture),
        one_row(len(x.q), x.memory.dtype),
        normalize=normalize,
        epsilon=EPSILON,
    )
    return out[0], memory[0], mass[0]


def bidirectional(x: Input, *, normalize: bool = False) -> Tensor:
    mixture = Coefficients.of(*x.mixture)
    rows = one_row(len(x.q), x.memory.dtype)
    memory, mass = chunked.write(x.k[None], x.val[None], mixture, rows, normalize=normalize)
    return chunked.read(
        x.q[None], memory, mass, mixture, rows, normalize=normalize, epsilon=EPSILON
    )[0]


def one_row(tokens: int, dtype: torch.dtype) -> Rows:
    return Rows.of(torch.tensor([tokens]), torch.tensor([0]), tokens, dtype)


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


class Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes of tensors that were there at one time, and the largest tensor's elements."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.largest = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        self.largest = max(self.largest, size // tensor.element_size())
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def memory_of(run: Callable[[], object]) -> Memory:
    memory = Memory()
    with torch.inference_mode(), memory:
        run()
    return memory


def test_memory_is_measured() -> None:
    def run() -> None:
        for _ in range(10):
            x = torch.zeros(1000)
            x = x + 1
            del x

    assert memory_of(run).peak == 8000
    assert memory_of(lambda: torch.zeros(10, 1) @ torch.zeros(1, 10)).largest == 100


@pytest.mark.parametrize("form", [causal, bidirectional])
def test_memory_grows_with_the_tokens_alone(form: Callable[[Input], object]) -> None:
    small_, large = (
        memory_of(partial(form, make(n, r=8, components=32, v=16).to(torch.float32)))
        for n in (2048, 8192)
    )
    assert large.peak <= 4.1 * small_.peak
    # Neither N * N nor N * K * v: a block's affinities are the largest.
    assert large.largest <= 8192 * 2 * chunked.BLOCK


def test_step_memory_does_not_grow_with_what_was_read() -> None:
    classifier = small()
    document = torch.randint(0, 50, (8192,))
    short, long = (
        memory_of(partial(classifier.read, [document[:n]], chunk=256)) for n in (2048, 8192)
    )
    assert long.peak <= 1.02 * short.peak


def test_bidirectional_memory_grows_with_the_tokens() -> None:
    classifier = small(causal=False)
    document = torch.randint(0, 50, (16384,))
    short, long = (
        memory_of(partial(classifier.read, [document[:n]], chunk=256)) for n in (4096, 16384)
    )
    assert 2.0 * short.peak <= long.peak <= 4.1 * short.peak
    assert long.largest == short.largest
