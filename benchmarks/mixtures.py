"""Gaussian Mixture Attention among the mixers that are compared: inputs and implementations.

Shapes: N tokens, H heads, r routing_dim, K components, v value_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Problem:
    """A mixer at one length: its inputs, what is run on them, and what that must give.

    To call a problem is to run it on its inputs.
    """

    run: Callable[..., tuple[Tensor, ...]]  # the first is (1, N, H, v), or the same in rows
    inputs: tuple[Tensor, ...]  # all that grow with N, tokens in dimension 1
    expected: Callable[[], tuple[Tensor, ...]]  # in float64; slow

    def __call__(self) -> tuple[Tensor, ...]:
        return self.run(*self.inputs)

    def with_gradients(self) -> Problem:
        """The same, which gives the gradients of its inputs behind its main output.

        Each call makes its autograd graph from the leaves on: what a backward does runs on the
        stream where its forward was, and a CUDA graph can hold only what was so captured.
        """
        d_out = torch.randn_like(self()[0])

        @torch.enable_grad()
        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = self.run(*leaves)[0]
            return out.detach(), *torch.autograd.grad(out, leaves, d_out)

        return replace(self, run=run)


def random(*shape: int, device: torch.device) -> Tensor:
    """Normal numbers in bfloat16."""
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


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
        projected = random(1, tokens, heads * (2 * r + v), device=device)
        parts = torch.split(projected, [heads * r, heads * r, heads * v], -1)
        q, k, val = (part.view(1, tokens, heads, -1) for part in parts)
        val += 0.5  # so that means of many values do not vanish
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

    def state(self) -> tuple[Tensor, Tensor]:
        """memory (1, H, K, v) and mass (1, H, K) of a new document."""
        heads, components, _ = self.distribution[0].shape
        memory = torch.zeros(1, heads, components, self.val.shape[-1], device=self.val.device)
        return memory, memory[..., 0].contiguous()

    def rows(self) -> Rows:
        """The layout of the document in rows."""
        chunk = min(ROW, self.q.shape[1])
        lengths = torch.full((self.q.shape[1] // chunk,), chunk, device=self.q.device)
        rows = Rows.of(lengths, torch.zeros_like(lengths), chunk, torch.float32)
        return rows._replace(belongs=rows.belongs[:1], first=rows.first[:1], count=rows.count[:1])


def in_rows(*inputs: Tensor) -> list[Tensor]:
    """Views of inputs (1, N, ...) in rows of up to ROW tokens."""
    return [x.view(-1, min(ROW, x.shape[1]), *x.shape[2:]) for x in inputs]


def by_rows(causal: Callable[..., Any]) -> Callable[[int, Size, torch.device], Problem]:
    """A problem for one of our own implementations, such as `gma.model.ops.chunked.causal`."""

    def build(tokens: int, size: Size, device: torch.device) -> Problem:
        given = Ours.of(tokens, size, device)
        state, mixture, rows = given.state(), given.mixture, given.rows()

        def run(q: Tensor, k: Tensor, val: Tensor) -> tuple[Tensor, ...]:
            out, memory, mass = causal(
                *in_rows(q, k, val), *state, mixture, rows, normalize=True, epsilon=EPSILON,
                device=device,
            )  # fmt: skip
            return out, memory[0], mass[0]

        return Problem(run, given[:3], given.expected)

    return build


def forgetting_rows(tokens: int, size: Size, device: torch.device) -> Problem:
    """Our kernels of the form that forgets, at rates as heads have them at first."""
    given = Ours.of(tokens, size, device)
    state, mixture, rows = given.state(), given.mixture, given.rows()
    forgetting = import_module("gma.model.ops.triton.operators").forgetting
    rates = torch.logspace(-3.5, -0.8, size.heads, device=device)
    forgotten = torch.rand(1, tokens, size.heads, device=device) * 2 * rates
    log_keep = -forgotten.clamp(max=MOST_FORGOTTEN)

    def run(q: Tensor, k: Tensor, val: Tensor, log_keep: Tensor) -> tuple[Tensor, ...]:
        *parts, kept = in_rows(q, k, val, log_keep)
        out, memory, mass = forgetting(
            *parts, *state, mixture, kept, rows, normalize=True, epsilon=EPSILON
        )
        return out, memory[0], mass[0]

    def expected() -> tuple[Tensor, ...]:
        memory, mass = (x[0].double() for x in state)
        return reference.forgetting(
            *given.gammas(), given.val[0].double(), log_keep[0].double(), memory, mass,
            epsilon=EPSILON,
        )  # fmt: skip

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
    (memory, mass), mixture = given.state(), given.mixture

    def run(q: Tensor, k: Tensor, val: Tensor) -> tuple[Tensor, ...]:
        gamma_q, gamma_k = gammas_of(q, k, mixture)
        out, *after = reference.causal(
            gamma_q[0], gamma_k[0], val[0].float(), memory[0], mass[0], epsilon=EPSILON
        )
        return out.to(val.dtype), *after

    return Problem(run, given[:3], given.expected)
