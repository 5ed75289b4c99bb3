"""The operators' gradients: operators themselves, which can't be differentiated again.

Shapes: as in `gma.model.ops.triton.operators`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gma.model.ops.chunked import Coefficients
from gma.model.ops.triton import backward, scans
from gma.model.ops.triton.arguments import (
    compact,
    contiguous,
    packed,
    unit_stride,
    unpacked,
)
from gma.model.ops.triton.launch import ENOUGH, Launcher, Sums, Units, launch


@torch.library.custom_op("gma::causal_backward", mutates_args=())
def causal_backward(
    d_out: Tensor,
    d_memory: Tensor,
    d_mass: Tensor,
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
) -> list[Tensor]:
    """Return the gradients of q, k, val, memory, mass, the mixture and log_keep.

    Without log_keep its is empty.
    """
    mixture = contiguous(linear, quadratic, bias)
    log_keep = None if log_keep is None else log_keep.contiguous()
    q, k, val, memory, mass = unit_stride(q, k, val, memory, mass)
    d_out = d_out.contiguous()
    K, v = memory.shape[2:]
    # Summed again rather than kept from forward until now.
    forward = Launcher.of(q, K, v, normalize, cut)
    before, *after = forward.states_before(
        k, val, forward.units(log_keep, lengths), memory, mass, mixture, lengths, first, count
    )
    launcher = _launcher_of(q, K, v, normalize, cut)
    units = launcher.units(log_keep, lengths)
    q_scores, inverse, pull, sums = _query_gradients(
        launcher, q, k, val, units, mixture, lengths, None, before.sums, d_out, epsilon
    )
    d_states = before._replace(sums=sums)
    d_before = _suffixes(launcher, d_states, packed(d_memory, d_mass), first, count)
    k_scores, d_val, d_upto = _key_gradients(
        launcher, q, k, val, units, mixture, lengths, None, sums, d_out, inverse, pull, epsilon
    )
    (d_q, d_k), d_mixture = _score_gradients(
        launcher, mixture, lengths, (q, q_scores), (k, k_scores)
    )
    d_memory, d_mass = unpacked(d_before)
    d_log_keep = d_upto
    if log_keep is not None:
        d_log_keep = _kept_gradients(
            launcher, d_upto, before.sums, packed(*after), sums, lengths, first, count
        )
    return [d_q, d_k, d_val, d_memory, d_mass, *d_mixture, d_log_keep]


@causal_backward.register_fake
def _(d_out: Tensor, d_memory: Tensor, d_mass: Tensor, *saved: Any) -> list[Tensor]:
    return _like(*saved[:9])


@torch.library.custom_op("gma::write_backward", mutates_args=())
def write_backward(
    d_memory: Tensor,
    d_mass: Tensor,
    k: Tensor,
    val: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    bias: Tensor,
    lengths: Tensor,
    document: Tensor,
    normalize: bool,
    cut: Sequence[int] | None,
) -> list[Tensor]:
    """Return the gradients of k, val and the mixture."""
    mixture = contiguous(linear, quadratic, bias)
    k, val = unit_stride(k, val)
    K, v = d_memory.shape[2:]
    launcher = _launcher_of(k, K, v, normalize, cut)
    d_states = packed(d_memory, d_mass)
    k_scores, d_val, _ = _key_gradients(
        launcher, None, k, val, Units(), mixture, lengths, document, d_states, None, None, None, 0.0
    )
    (d_k,), d_mixture = _score_gradients(launcher, mixture, lengths, (k, k_scores))
    return [d_k, d_val, *d_mixture]


@write_backward.register_fake
def _(d_memory: Tensor, d_mass: Tensor, *saved: Any) -> list[Tensor]:
    return _like(*saved[:5])


@torch.library.custom_op("gma::read_backward", mutates_args=())
def read_backward(
    d_out: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, memory, mass and the mixture."""
    mixture = contiguous(linear, quadratic, bias)
    (q,) = unit_stride(q)
    K, v = memory.shape[2:]
    launcher = _launcher_of(q, K, v, normalize, cut)
    states = packed(memory, mass)
    q_scores, _, _, sums = _query_gradients(
        launcher, q, None, None, Units(), mixture, lengths, document, states, d_out.contiguous(),
        epsilon,
    )  # fmt: skip
    d_states = _suffixes(launcher, Sums(sums, None), torch.zeros_like(states), first, count)
    (d_q,), d_mixture = _score_gradients(launcher, mixture, lengths, (q, q_scores))
    d_memory, d_mass = unpacked(d_states)
    return d_q, d_memory, d_mass, *d_mixture


@read_backward.register_fake
def _(d_out: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    return tuple(_like(*saved[:6]))


def _like(first: Tensor, *others: Tensor | None) -> list[Tensor]:
    empty = first.new_empty((0, 0, 0), dtype=torch.float32)
    return [empty.clone() if x is None else x.new_empty(x.shape) for x in (first, *others)]


def _refuse(ctx: object, *_: object) -> None:
    raise RuntimeError("the operation in Triton can be differentiated once, not twice")


causal_backward.register_autograd(_refuse)
write_backward.register_autograd(_refuse)
read_backward.register_autograd(_refuse)


def _launcher_of(x: Tensor, K: int, v: int, normalize: bool, cut: Sequence[int] | None) -> Launcher:
    """Cut as forward, but into smaller blocks, for a program has more to hold."""
    launcher = Launcher.of(x, K, v, normalize, cut)
    if cut:
        return launcher
    block = (64 if x.dtype == torch.bfloat16 else 32) * 64 // max(x.shape[3], K, v)
    smaller = launcher.cut._replace(
        block=min(block, 64), stages=1, sum_registers=0, read_registers=0
    )
    return launcher._replace(cut=smaller)


def _query_gradients(
    launcher: Launcher,
    q: Tensor,
    k: Tensor | None,
    val: Tensor | None,
    units: Units,
    mixture: Coefficients,
    lengths: Tensor,
    document: Tensor | None,
    states: Tensor,
    d_out: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `backward.query_gradients` stores; it is causal if there is no document."""
    d_scores = _new_scores(launcher, q)
    inverse, pull = q.new_empty((2, *q.shape[:3]), dtype=torch.float32)
    sums = q.new_empty(launcher.sums_shape, dtype=torch.float32)
    launcher.over_segments(
        backward.query_gradients, q=q, k=k, val=val, **units.arguments, **mixture._asdict(),
        lengths=lengths, document=document, states=states, d_out=d_out, d_scores=d_scores,
        inverse=inverse, pull=pull, sums=sums, epsilon=epsilon, CAUSAL=document is None,
    )  # fmt: skip
    return d_scores, inverse, pull, sums


def _suffixes(
    launcher: Launcher, sums: Sums, after: Tensor, first: Tensor, count: Tensor
) -> Tensor:
    """Put what comes after each segment in the place of its sum; return what is before all."""
    before = torch.empty_like(after)
    launcher.over_documents(
        scans.suffix, len(first), **sums.arguments, after=after, before=before, first_row=first,
        row_count=count,
    )  # fmt: skip
    return before


def _key_gradients(
    launcher: Launcher,
    q: Tensor | None,
    k: Tensor,
    val: Tensor,
    units: Units,
    mixture: Coefficients,
    lengths: Tensor,
    document: Tensor | None,
    d_states: Tensor,
    d_out: Tensor | None,
    inverse: Tensor | None,
    pull: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `backward.key_gradients` stores; it is causal if there is no document."""
    d_scores = _new_scores(launcher, k)
    d_val = val.new_empty(val.shape)
    # Zeros where no token is; if nothing is forgotten, empty.
    shape = (0, 0, 0) if units.grown is None else units.grown.shape
    d_upto = k.new_zeros(shape, dtype=torch.float32)
    launcher.over_segments(
        backward.key_gradients, q=q, k=k, val=val, **units.arguments, **mixture._asdict(),
        lengths=lengths, document=document, d_states=d_states, d_out=d_out, inverse=inverse,
        pull=pull, d_scores=d_scores, d_val=d_val, d_upto=d_upto, epsilon=epsilon,
        CAUSAL=document is None,
    )  # fmt: skip
    return d_scores, d_val, compact(d_upto.mT)


def _kept_gradients(
    launcher: Launcher,
    d_upto: Tensor,
    before: Tensor,
    after: Tensor,
    d_after: Tensor,
    lengths: Tensor,
    first: Tensor,
    count: Tensor,
) -> Tensor:
    """Return the gradient of log_keep (R, C, H).

    It is the sum over later tokens of d_upto (R, C, H), the gradients of the logarithms of what is
    kept from the document's beginning on: those in the segment, and for all behind it the product
    of the state after the segment and its gradient. before and d_after (G, H, v + 1, K): states
    before the segments, and gradients of those after them. after (D, H, v + 1, K): the documents'.
    """
    R, C, H = d_upto.shape
    segment, segments = launcher.cut.segment, launcher.segments
    # The states after the segments: before the next, or after the document. One more for documents
    # without rows.
    ends = torch.cat([before[1:], before.new_zeros(2, *before.shape[1:])])
    lasts = torch.where(count > 0, (first + count) * segments - 1, len(before))
    ends = ends.index_copy(0, lasts, after)[:-1]
    behind = (ends * d_after).sum((2, 3))  # (G, H)
    behind = behind.view(R, segments, 1, H)
    own = functional.pad(d_upto, (0, 0, 0, segments * segment - C)).view(R, segments, segment, H)
    later = own.flip(2).cumsum(2).flip(2) + behind
    there = torch.arange(C, device=lengths.device) < lengths[:, None]
    return later.view(R, -1, H)[:, :C].masked_fill(~there[..., None], 0.0)


def _new_scores(launcher: Launcher, x: Tensor) -> Tensor:
    """Room for gradients of the scores of x, (R, C, H, K): float16 would lose small ones."""
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    return x.new_empty((*x.shape[:3], launcher.shape.K), dtype=dtype)


def _score_gradients(
    launcher: Launcher, mixture: Coefficients, lengths: Tensor, *scored: tuple[Tensor, Tensor]
) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Take tokens, and gradients of their scores, to gradients of the tokens and of the mixture."""
    R, C, H, r, K, _ = launcher.shape
    row_blocks = -(-C // launcher.cut.block)
    # Each program's share of the mixture's gradients, summed in an order that never changes.
    programs = min(R * row_blocks, -(-ENOUGH // H))
    shares = mixture.bias.new_empty((len(scored), programs, H, 2 * r + 1, K))
    found = []
    for (x, d_scores), own in zip(scored, shares, strict=True):
        d_x = x.new_empty(x.shape)
        launch(
            backward.score_gradients, (programs, H), x=x, d_scores=d_scores,
            linear=mixture.linear, quadratic=mixture.quadratic, lengths=lengths, d_x=d_x,
            d_mixture=own, C=C, blocks=R * row_blocks, row_blocks=row_blocks, H=H, R=r, K=K,
            **launcher.tuned,
        )  # fmt: skip
        found.append(d_x)
    total = shares.sum((0, 1))
    linear, quadratic = total[:, :r].mT.contiguous(), total[:, r : 2 * r].mT.contiguous()
    return found, (linear, quadratic, compact(total[:, 2 * r]))
