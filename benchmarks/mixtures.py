"""Gaussian Mixture Attention among the mixers that are compared: inputs and implementations.

Shapes: N tokens, H heads, r routing_dim, K components, v value_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import definitions
from gma.model.ops import chunked, reference
from gma.model.ops.chunked import Coefficients, Rows
from gma.model.ops.forgetting import MOST_FORGOTTEN

EPSILON = 1e-6
ROW = 1024
"""Tokens of a row, where our own implementations read by rows."""


class Size(NamedTuple):
    heads: int = 12
    routing: int = 32
    components: int = 32
    value: int = 64


class Problem(NamedTuple):
    """A mixer at one length: its inputs, the call that is timed, and what it must give."""

    run: Callable[[], tuple[Tensor, ...]]  # the first is (1, N, H, v), or the same in rows
    inputs: tuple[Tensor, ...]  # all that grow with N, tokens in dimension 1
    expected: Callable[[], tuple[Tensor, ...]]  # in float64; slow

    def with_gradients(self) -> Problem:
        """The same, whose call gives the gradients of its inputs too."""
        wanted = [x for x in self.inputs if x.requires_grad]
        d_out = torch.randn_like(self.run()[0])

        def run() -> tuple[Tensor, ...]:
            out = self.run()[0]
            return out.detach(), *torch.autograd.grad(out, wanted, d_out)

        return self._replace(run=run)


def random(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers, of which gradients are wanted where any are."""
    return grown(torch.randn(shape, device=device, dtype=dtype))


def grown(x: Tensor) -> Tensor:
    """x as an input of its own."""
    return x.detach().requires_grad_(torch.is_grad_enabled())


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function, compiled for exactly the shapes of its calls; on the CPU as it is."""
    return torch.compile(function, dynamic=False) if device.type == "cuda" else function


class Ours(NamedTuple):
    """Routing vectors and values as a layer's projection leaves them, and a mixture."""

    q: Tensor  # (1, N, H, r)
    k: Tensor
    val: Tensor  # (1, N, H, v)
    distribution: tuple[Tensor, Tensor, Tensor]  # mu and var (H, K, r), log_pi (H, K)

    @classmethod
    def of(cls, tokens: int, size: Size, device: torch.device) -> Ours:
        heads, r, K, v = size  # noqa: N806 (the paper's letters)
        projected = torch.randn(1, tokens, heads * (2 * r + v), device=device, dtype=torch.bfloat16)
        parts = torch.split(projected, [heads * r, heads * r, heads * v], -1)
        q, k, val = (part.view(1, tokens, heads, -1) for part in parts)
        val += 0.5  # so that means of many values do not vanish
        q, k, val = grown(q), grown(k), grown(val)
        mu = torch.randn(heads, K, r, device=device)
        var = torch.rand(heads, K, r, device=device) * 2 + 0.5
        return cls(q, k, val, (mu, var, torch.randn(heads, K, device=device).log_softmax(-1)))

    @property
    def mixture(self) -> Coefficients:
        return Coefficients.of(*self.distribution)

    def gammas(self) -> tuple[Tensor, Tensor]:
        q, k = (definitions.responsibilities(x[0], self.distribution) for x in (self.q, self.k))
        return q, k

    def expected(self) -> tuple[Tensor, ...]:
        """out (N, H, v), memory (H, K, v) and mass (H, K), in float64."""
        return definitions.mixture_attention(*self.gammas(), self.val[0], EPSILON)

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Rows]:
        """q, k and val in rows, memory and mass of one new document, and the rows' layout."""
        chunk = min(ROW, self.q.shape[1])
        parts = [x.view(-1, chunk, *x.shape[2:]) for x in (self.q, self.k, self.val)]
        count, _, heads, value = parts[2].shape
        lengths = torch.full((count,), chunk, device=self.q.device)
        rows = Rows.of(lengths, torch.zeros_like(lengths), chunk, torch.float32)
        rows = rows._replace(belongs=rows.belongs[:1], first=rows.first[:1], count=rows.count[:1])
        components = self.distribution[0].shape[1]
        memory = torch.zeros(1, heads, components, value, device=self.q.device)
        return parts[0], parts[1], parts[2], memory, memory[..., 0].contiguous(), rows


def by_rows(causal: Callable[..., Any]) -> Callable[[int, Size, torch.device], Problem]:
    """A problem for one of our own implementations, such as `gma.model.ops.chunked.causal`."""

    def build(tokens: int, size: Size, device: torch.device) -> Problem:
        given = Ours.of(tokens, size, device)
        *parts, rows = given.rows()
        mixture = given.mixture

        def run() -> tuple[Tensor, ...]:
            out, memory, mass = causal(
                *parts, mixture, rows, normalize=True, epsilon=EPSILON, device=device
            )
            return out, memory[0], mass[0]

        return Problem(run, given[:3], given.expected)

    return build


def forgetting_rows(tokens: int, size: Size, device: torch.device) -> Problem:
    """Our kernels of the form that forgets, at rates as heads have them at first."""
    given = Ours.of(tokens, size, device)
    *parts, rows = given.rows()
    causal = import_module("gma.model.ops.triton.operators").forgetting
    shape = *parts[0].shape[:2], size.heads
    rates = torch.logspace(-3.5, -0.8, size.heads, device=device)
    log_keep = grown(-(torch.rand(shape, device=device) * 2 * rates).clamp(max=MOST_FORGOTTEN))
    mixture = given.mixture

    def run() -> tuple[Tensor, ...]:
        out, memory, mass = causal(*parts, mixture, log_keep, rows, normalize=True, epsilon=EPSILON)
        return out, memory[0], mass[0]

    def expected() -> tuple[Tensor, ...]:
        memory, mass = (x[0].double() for x in parts[3:])
        kept = log_keep.flatten(0, 1).double()
        return reference.forgetting(
            *given.gammas(), given.val[0].double(), kept, memory, mass, epsilon=EPSILON
        )

    return Problem(run, (*given[:3], log_keep), expected)


def fused(*args: Any, device: torch.device, **options: Any) -> Any:
    """The Triton kernels, which are imported only here: they need a GPU, or an interpreter."""
    return import_module("gma.model.ops.triton.operators").causal(*args, **options)


def _narrow(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, memory, mass = chunked.causal(*args, **options)
    return out.to(args[0].dtype), memory, mass


_compiled_chunked = torch.compile(_narrow, dynamic=False)


def chunks(*args: Any, device: torch.device, **options: Any) -> Any:
    """The chunked form in PyTorch, compiled on a GPU."""
    return (_compiled_chunked if device.type == "cuda" else _narrow)(*args, **options)


def gammas_of(q: Tensor, k: Tensor, mixture: Coefficients) -> tuple[Tensor, Tensor]:
    """q, k (1, N, H, r) -> responsibilities (1, N, H, K) of each, float32."""
    gamma_q, gamma_k = (
        chunked.responsibilities(x, mixture, normalize=True).transpose(1, 2) for x in (q, k)
    )
    return gamma_q, gamma_k


def cumulative(tokens: int, size: Size, device: torch.device) -> Problem:
    """The published form, whose memory at every token is a cumulative sum."""
    given = Ours.of(tokens, size, device)
    *_, memory, mass, _ = given.rows()

    def sums(q: Tensor, k: Tensor, val: Tensor, mixture: Coefficients) -> tuple[Tensor, ...]:
        gamma_q, gamma_k = gammas_of(q, k, mixture)
        out, *after = reference.causal(
            gamma_q[0], gamma_k[0], val[0].float(), memory[0], mass[0], epsilon=EPSILON
        )
        return out.to(val.dtype), *after

    mixture = given.mixture
    return Problem(lambda: sums(*given[:3], mixture), given[:3], given.expected)
