"""Gaussian Mixture Attention over the rows of a step, in Triton.

Source: arXiv:2606.18283. Signatures, shapes and meaning are those of `gma.model.ops.chunked`, with
tokens in bfloat16 or float32, mixture and states in float32, and outputs in the tokens'
dtype. Each function is an operator of `torch.library`: one node to autograd and torch.compile.

Shapes: R rows of C tokens, D documents, H heads, r routing_dim, K components, v value_dim, G
segments. r, K and v are powers of two from 16 to 128. A document's rows stand together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gma.model.ops.chunked import Coefficients, Rows
from gma.model.ops.triton import forward, gradients
from gma.model.ops.triton.arguments import (
    check,
    contiguous,
    packed,
    unit_stride,
    unpacked,
)
from gma.model.ops.triton.launch import Cut, Kept, Launcher, Units


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
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `gma.model.ops.chunked.causal`. Raises ValueError for what the kernels can't take."""
    out, memory, mass, *_ = _causal(
        q, k, val, memory, mass, *mixture, None, rows.lengths, rows.first, rows.count,
        normalize, epsilon, cut,
    )  # fmt: skip
    return out, memory, mass


def forgetting(
    q: Tensor,
    k: Tensor,
    val: Tensor,
    memory: Tensor,
    mass: Tensor,
    mixture: Coefficients,
    log_keep: Tensor,
    rows: Rows,
    *,
    normalize: bool,
    epsilon: float,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `gma.model.ops.forgetting.causal`. Raises ValueError for what the kernels can't take."""
    out, memory, mass, *_ = _causal(
        q, k, val, memory, mass, *mixture, log_keep, rows.lengths, rows.first, rows.count,
        normalize, epsilon, cut,
    )  # fmt: skip
    return out, memory, mass


def write(
    k: Tensor,
    val: Tensor,
    mixture: Coefficients,
    rows: Rows,
    *,
    normalize: bool,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor]:
    """See `gma.model.ops.chunked.write`. Raises ValueError for what the kernels can't take."""
    memory, mass = _write(
        k, val, *mixture, rows.lengths, rows.document, rows.first, rows.count, normalize, cut

    )  # fmt: skip
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
    cut: Cut | None = None,
) -> Tensor:
    """See `gma.model.ops.chunked.read`. Raises ValueError for what the kernels can't take."""
    out: Tensor = _read(
        q, memory, mass, *mixture, rows.lengths, rows.document, rows.first, rows.count,
        normalize, epsilon, cut,
    )  # fmt: skip
    return out


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
    log_keep: Tensor | None,
    lengths: Tensor,
    first: Tensor,
    count: Tensor,
    normalize: bool,
    epsilon: float,
    cut: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return also what backward needs of the segments: the states before them, and decays."""
    mixture = contiguous(linear, quadratic, bias)
    check(
        mixture, q=q, k=k, val=val, log_keep=log_keep, memory=memory, mass=mass,
        lengths=lengths, first=first, count=count,
    )  # fmt: skip
    log_keep = None if log_keep is None else log_keep.contiguous()
    q, k, val, memory, mass = unit_stride(q, k, val, memory, mass)
    launcher = Launcher.of(q, bias.shape[1], val.shape[3], normalize, cut)
    kept = Kept(
        gammas=val.new_empty(launcher.gammas_shape),
        masses=val.new_empty(launcher.masses_shape, dtype=torch.float32),
    )
    units = launcher.units(log_keep, lengths)
    before, memory, mass = launcher.states_before(
        k, val, units, memory, mass, mixture, lengths, first, count, kept
    )
    out = val.new_empty(val.shape)
    launcher.read_segments(q, val, units, mixture, lengths, before.sums, kept, out, epsilon=epsilon)
    decays = mass.new_empty((0, 0)) if before.decays is None else before.decays
    return out, memory, mass, before.sums, decays


@_causal.register_fake
def _(
    q: Tensor,
    k: Tensor,
    val: Tensor,
    memory: Tensor,
    mass: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    bias: Tensor,
    log_keep: Tensor | None,
    lengths: Tensor,
    first: Tensor,
    count: Tensor,
    normalize: bool,
    epsilon: float,
    cut: Sequence[int] | None,
) -> tuple[Tensor, ...]:
    shape = Launcher.of(q, bias.shape[1], val.shape[3], normalize, cut).sums_shape
    decays = mass.new_empty((0, 0) if log_keep is None else shape[:2])
    return *(x.new_empty(x.shape) for x in (val, memory, mass)), mass.new_empty(shape), decays


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
    cut: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    mixture = contiguous(linear, quadratic, bias)
    check(mixture, k=k, val=val, lengths=lengths, document=document, first=first, count=count)
    k, val = unit_stride(k, val)
    D, (H, K), v = len(first), bias.shape, val.shape[3]
    launcher = Launcher.of(k, K, v, normalize, cut)
    nothing = k.new_zeros(max(K, v), dtype=torch.float32)
    memory, mass = nothing[:v].expand(D, H, K, v), nothing[:K].expand(D, H, K)
    _, memory, mass = launcher.states_before(
        k, val, Units(), memory, mass, mixture, lengths, first, count
    )
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
    shape = first.shape[0], *bias.shape
    return bias.new_empty((*shape, val.shape[3])), bias.new_empty(shape)


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
    cut: Sequence[int] | None,
) -> Tensor:
    mixture = contiguous(linear, quadratic, bias)
    check(
        mixture, q=q, memory=memory, mass=mass,
        lengths=lengths, document=document, first=first, count=count,
    )  # fmt: skip
    (q,) = unit_stride(q)
    K, v = memory.shape[2:]
    out = q.new_empty((*q.shape[:3], v))
    Launcher.of(q, K, v, normalize, cut).over_segments(
        forward.read_states, q=q, **mixture._asdict(), lengths=lengths, document=document,
        states=packed(memory, mass), out=out, epsilon=epsilon,
    )  # fmt: skip
    return out


@_read.register_fake
def _(q: Tensor, memory: Tensor, *_: object) -> Tensor:
    return q.new_empty((*q.shape[:3], memory.shape[3]))


def _save_causal(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, val, memory, mass, *others = inputs[:12]
    ctx.save_for_backward(q, k, val, *others, *output[3:])
    ctx.states, ctx.settings = (memory.shape, mass.shape), inputs[12:]
    # What is kept for backward has no gradients, nor have states that nobody reads.
    ctx.set_materialize_grads(False)


def _causal_backward(
    ctx: Any, d_out: Tensor | None, d_memory: Tensor | None, d_mass: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    q, k, val, *others = ctx.saved_tensors
    d_out = torch.zeros_like(val) if d_out is None else d_out
    d_after = None
    if d_memory is not None or d_mass is not None:
        d_states = zip((d_memory, d_mass), ctx.states, strict=True)
        d_after = packed(
            *(q.new_zeros(shape, dtype=torch.float32) if d is None else d for d, shape in d_states)
        )
    d_q, d_k, d_val, d_before, d_mixture, d_log_keep = gradients.causal_backward(
        d_out, d_after, q, k, val, *others, *ctx.settings
    )
    return (
        d_q, d_k, d_val, *unpacked(d_before), *_mixture(d_mixture),
        d_log_keep if d_log_keep.numel() else None, *[None] * 6,
    )  # fmt: skip


def _save_write(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.settings = inputs[9:]


def _write_backward(ctx: Any, d_memory: Tensor, d_mass: Tensor) -> tuple[Tensor | None, ...]:
    d_after = packed(d_memory, d_mass)
    d_k, d_val, d_mixture = gradients.write_backward(d_after, *ctx.saved_tensors, *ctx.settings)
    return d_k, d_val, *_mixture(d_mixture), *[None] * 6


def _save_read(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.settings = inputs[10:]


def _read_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    q, memory, mass, *others = ctx.saved_tensors
    d_q, d_states, d_mixture = gradients.read_backward(
        d_out, q, packed(memory, mass), *others, *ctx.settings
    )
    return d_q, *unpacked(d_states), *_mixture(d_mixture), *[None] * 7


def _mixture(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of a mixture's gradient (H, 2 r + 1, K) in the form of `Coefficients`."""
    r = gradient.shape[1] // 2
    return gradient[:, :r].mT, gradient[:, r : 2 * r].mT, gradient[:, 2 * r]


_causal.register_autograd(_causal_backward, setup_context=_save_causal)
_write.register_autograd(_write_backward, setup_context=_save_write)
_read.register_autograd(_read_backward, setup_context=_save_read)
