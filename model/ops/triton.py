"""Gaussian Mixture Attention over the rows of a step, in Triton.

Source: arXiv:2606.18283. Signatures, shapes and meaning are those of `model.ops.chunked`, with
tokens in bfloat16, float16 or float32, mixture and states in float32, and outputs in the tokens'
dtype. Each function is an operator of `torch.library`: one node to autograd and torch.compile.

Shapes: R rows of C tokens, D documents, H heads, r routing_dim, K components, v value_dim, G
segments. r, K and v are powers of two from 16 to 128. A document's rows stand together.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from model.ops import kernels
from model.ops.chunked import ROUTING_EPSILON, Coefficients, Rows

WIDTHS = {16, 32, 64, 128}
DTYPES = torch.bfloat16, torch.float16, torch.float32
INTERPRETED = bool(kernels.INTERPRETED.value)

TILE, DEPTH = 64, 32
"""Entries of a state, and segments, that a program sums at once."""


class Plan(NamedTuple):
    """How a shape is cut, and what the kernels are launched with."""

    segment: int
    block: int = 64
    warps: int = 4
    stages: int = 3
    registers: int = 0
    """Of a thread that reads; 0 leaves it to the compiler."""

    @classmethod
    def of(cls, rows: int, chunk: int, heads: int, widest: int) -> Plan:
        """Long segments save memory traffic, many keep the device busy.

        widest: the largest of routing_dim, num_components and value_dim.
        """
        enough = 8 * 132
        tokens = min(1024, max(64, triton.next_power_of_2(chunk)))
        while tokens > 64 and rows * heads * -(-chunk // tokens) < enough:
            tokens //= 2
        if widest > 64:
            return cls(tokens, warps=8, stages=1)
        # Three programs of a multiprocessor hide each other's waits better than two.
        return cls(tokens, registers=168)

    @property
    def limit(self) -> dict[str, int]:
        """The option that holds a kernel to `registers`."""
        return {"maxnreg": self.registers} if self.registers else {}


def causal(
    q: Tensor,
    k: Tensor,
    val: Tensor,
    memory: Tensor,
    mass: Tensor,
    mixture: Coefficients,
    rows: Rows,
    *,
    normalize: bool,
    epsilon: float,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `model.ops.chunked.causal`. Raises ValueError for what the kernels can't take."""
    out, memory, mass = _causal(
        q, k, val, memory, mass, *mixture, rows.lengths, rows.first, rows.count,
        normalize, epsilon, plan,
    )  # fmt: skip
    return out, memory, mass


def write(
    k: Tensor,
    val: Tensor,
    mixture: Coefficients,
    rows: Rows,
    *,
    normalize: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """See `model.ops.chunked.write`. Raises ValueError for what the kernels can't take."""
    memory, mass = _write(
        k, val, *mixture, rows.lengths, rows.document, rows.first, rows.count, normalize, plan
    )
    return memory, mass


def read(
    q: Tensor,
    memory: Tensor,
    mass: Tensor,
    mixture: Coefficients,
    rows: Rows,
    *,
    normalize: bool,
    epsilon: float,
    plan: Plan | None = None,
) -> Tensor:
    """See `model.ops.chunked.read`. Raises ValueError for what the kernels can't take."""
    out: Tensor = _read(
        q, memory, mass, *mixture, rows.lengths, rows.document, rows.first, rows.count,
        normalize, epsilon, plan,
    )  # fmt: skip
    return out


Mixture = tuple[Tensor, Tensor, Tensor]


class _Call:
    """How a call's tokens (R, C, H, r) are cut, and what kernels over them are launched with."""

    def __init__(
        self,
        x: Tensor,
        components: int,
        value_dim: int,
        normalize: bool,
        plan: Sequence[int] | None,
    ) -> None:
        R, C, H, r = x.shape
        widest = max(r, components, value_dim)
        plan = Plan(*plan) if plan else Plan.of(R, C, H, widest)
        segments = -(-C // plan.segment)
        self.x = x
        self.limit = plan.limit
        self.blocks = plan.segment // plan.block
        self.grid = R * segments, H
        self.sizes = {"H": H, "K": components, "V": value_dim, "segments": segments}
        self.cut = {
            **self.sizes,
            "C": C,
            "R": r,
            "SEGMENT": plan.segment,
            "BLOCK": plan.block,
            "NORMALIZE": normalize,
            "EPSILON": ROUTING_EPSILON,
            "STAGES": plan.stages,
            "num_warps": plan.warps,
        }

    def over_segments(self, kernel: Any, *args: object, **more: object) -> None:
        with _device_of(self.x):
            kernel[self.grid](*args, **self.cut, **more)

    def over_documents(self, kernel: Any, documents: int, *args: object) -> None:
        """Launch a kernel whose programs each take a part of a document's and head's state."""
        size = (self.sizes["V"] + 1) * self.sizes["K"]
        grid = -(-size // TILE), self.sizes["H"], documents
        with _device_of(self.x):
            kernel[grid](*args, **self.sizes, TILE=TILE, DEPTH=DEPTH, SLOTS=False)

    def prefixes(
        self,
        k: Tensor,
        val: Tensor,
        memory: Tensor,
        mass: Tensor,
        mixture: Mixture,
        lengths: Tensor,
        first: Tensor,
        count: Tensor,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state before each segment (G, H, v + 1, K), and the memory and mass after all.

        kept: where to put gammas and masses, see `kernels._sum_segments`.
        """
        D, H, K, v = memory.shape
        sums = k.new_empty((self.grid[0], H, v + 1, K), dtype=torch.float32)
        self.over_segments(
            kernels._sum_segments, k, val, *mixture, lengths, sums, *(kept or (sums, sums)),
            *_strides(k, val), KEEP=kept is not None,
        )  # fmt: skip
        memory_after, mass_after = _new_state(k, D, K, v)
        self.over_documents(
            kernels._prefix, D, sums, memory, mass, memory_after, mass_after, first, count,
            first, first, *memory.stride()[:3], *mass.stride()[:2],
            *memory_after.stride()[:3], *mass_after.stride()[:2],
        )  # fmt: skip
        return sums, memory_after, mass_after


@torch.library.custom_op("gma::causal", mutates_args=())
def _causal(
    q: Tensor,
    k: Tensor,
    val: Tensor,
    memory: Tensor,
    mass: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    bias: Tensor,
    lengths: Tensor,
    first: Tensor,
    count: Tensor,
    normalize: bool,
    epsilon: float,
    plan: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    mixture = linear.contiguous(), quadratic.contiguous(), bias.contiguous()
    _check((q, k, val), (memory, mass, *mixture), bias.shape[1])
    q, k, val, memory, mass = _unit_stride(q, k, val, memory, mass)
    call = _Call(q, bias.shape[1], val.shape[3], normalize, plan)
    R, C, H = q.shape[:3]
    gammas = val.new_empty((R, H, C, bias.shape[1]))
    masses = val.new_empty((call.grid[0], H, call.blocks, bias.shape[1]), dtype=torch.float32)
    before, memory_after, mass_after = call.prefixes(
        k, val, memory, mass, mixture, lengths, first, count, (gammas, masses)
    )
    out = _new_out(q, val.shape[3])
    call.over_segments(
        kernels._read_segments, q, gammas, masses, val, *mixture, lengths, before, out,
        *_strides(q, val), epsilon=epsilon, **call.limit,
    )  # fmt: skip
    return out, memory_after, mass_after


@_causal.register_fake
def _(
    q: Tensor, k: Tensor, val: Tensor, memory: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    D, _H, K, v = memory.shape
    return _new_out(q, v), *_new_state(q, D, K, v)


@torch.library.custom_op("gma::write", mutates_args=())
def _write(
    k: Tensor,
    val: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    bias: Tensor,
    lengths: Tensor,
    document: Tensor,
    first: Tensor,
    count: Tensor,
    normalize: bool,
    plan: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    mixture = linear.contiguous(), quadratic.contiguous(), bias.contiguous()
    _check((k, val), mixture, bias.shape[1])
    k, val = _unit_stride(k, val)
    D, (H, K), v = len(first), bias.shape, val.shape[3]
    call = _Call(k, K, v, normalize, plan)
    nothing = k.new_zeros(max(K, v), dtype=torch.float32)
    memory, mass = nothing[:v].expand(D, H, K, v), nothing[:K].expand(D, H, K)
    _, memory, mass = call.prefixes(k, val, memory, mass, mixture, lengths, first, count)
    return memory, mass


@_write.register_fake
def _(
    k: Tensor,
    val: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    bias: Tensor,
    lengths: Tensor,
    document: Tensor,
    first: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor]:
    return _new_state(k, first.shape[0], bias.shape[1], val.shape[3])


@torch.library.custom_op("gma::read", mutates_args=())
def _read(
    q: Tensor,
    memory: Tensor,
    mass: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    bias: Tensor,
    lengths: Tensor,
    document: Tensor,
    first: Tensor,
    count: Tensor,
    normalize: bool,
    epsilon: float,
    plan: Sequence[int] | None,
) -> Tensor:
    mixture = linear.contiguous(), quadratic.contiguous(), bias.contiguous()
    _check((q,), (memory, mass, *mixture), bias.shape[1])
    (q,) = _unit_stride(q)
    call = _Call(q, bias.shape[1], memory.shape[3], normalize, plan)
    out = _new_out(q, memory.shape[3])
    call.over_segments(
        kernels._read_states, q, *mixture, lengths, document, _packed(memory, mass), out,
        *_strides(q), epsilon=epsilon,
    )  # fmt: skip
    return out


@_read.register_fake
def _(q: Tensor, memory: Tensor, *_: object) -> Tensor:
    return _new_out(q, memory.shape[3])


def _check(tokens: Sequence[Tensor], states: Sequence[Tensor], components: int) -> None:
    """Raises ValueError for what the kernels can't take."""
    x = tokens[0]
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(
            f"Triton's kernels run on a CUDA device, not on {x.device.type}: "
            "use model.ops.chunked, or set TRITON_INTERPRET=1 before triton is imported"
        )
    if x.dtype not in DTYPES or any(y.dtype != x.dtype for y in tokens):
        raise ValueError(f"q, k and val must be of one dtype of {DTYPES}")
    if any(y.dtype != torch.float32 for y in states):
        raise ValueError("memory, mass and mixture must be float32")
    if any(y.device != x.device for y in (*tokens, *states)):
        raise ValueError("all tensors must be on one device")
    if not {components, *(y.shape[3] for y in (*tokens, states[0]) if y.ndim == 4)} <= WIDTHS:
        raise ValueError(f"routing_dim, num_components and value_dim must be of {sorted(WIDTHS)}")


def _device_of(x: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Strided as they are, but for the last dimension, which kernels take to be contiguous."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of row, token and head, of each."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _packed(memory: Tensor, mass: Tensor) -> Tensor:
    """(D, H, K, v) and (D, H, K) -> (D, H, v + 1, K), as kernels hold a state."""
    return torch.cat([memory, mass[..., None]], -1).transpose(-1, -2).contiguous()


def _new_out(q: Tensor, value_dim: int) -> Tensor:
    return q.new_empty((*q.shape[:3], value_dim))


def _new_state(x: Tensor, documents: int, components: int, value_dim: int) -> tuple[Tensor, Tensor]:
    shape = documents, x.shape[2], components
    mass = x.new_empty(shape, dtype=torch.float32)
    return x.new_empty((*shape, value_dim), dtype=torch.float32), mass
