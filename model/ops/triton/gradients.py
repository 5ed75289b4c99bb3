"""The operators' gradients: operators themselves, which can't be differentiated again.

Shapes: as in `gma.model.ops.triton.operators`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gma.model.ops.chunked import Coefficients
from gma.model.ops.triton import backward, scans, scores
from gma.model.ops.triton.arguments import contiguous, unit_stride
from gma.model.ops.triton.launch import ENOUGH, Launcher, Sums, Units, launch


@torch.library.custom_op("gma::causal_backward", mutates_args=())
def causal_backward(
    d_out: Tensor,
    d_after: Tensor | None,
    q: Tensor,
    k: Tensor,
    val: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    bias: Tensor,
    log_keep: Tensor | None,
    lengths: Tensor,
    first: Tensor,
    count: Tensor,
    before: Tensor,
    decays: Tensor,
    normalize: bool,
    epsilon: float,
    cut: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, val, states, mixture and log_keep; its is empty without one.

    d_after (D, H, v + 1, K): of the states after the step. before (G, H, v + 1, K) and decays
    (G, H) are what forward made of the segments.
    """
    mixture = contiguous(linear, quadratic, bias)
    q, k, val = unit_stride(q, k, val)
    d_out = d_out.contiguous()
    launcher = _launcher_of(q, bias.shape[1], val.shape[3], normalize, cut)
    units = launcher.units(None if log_keep is None else log_keep.contiguous(), lengths)
    q_scores, inverse, pull, sums, ends = _query_gradients(
        launcher, q, k, val, units, mixture, lengths, None, before, d_out, epsilon
    )
    d_states = Sums(sums, None if log_keep is None else decays)
    d_before = _suffixes(launcher, d_states, d_after, first, count)
    k_scores, d_val, d_log_keep = _key_gradients(
        launcher, q, k, val, units, mixture, lengths, None, sums, d_out, inverse, pull, ends,
        epsilon,
    )  # fmt: skip
    (d_q, d_k), d_mixture = _score_gradients(
        launcher, mixture, lengths, (q, q_scores), (k, k_scores)
    )
    return d_q, d_k, d_val, d_before, d_mixture, d_log_keep


@causal_backward.register_fake
def _(
    d_out: Tensor,
    d_after: Tensor | None,
    q: Tensor,
    k: Tensor,
    val: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    bias: Tensor,
    log_keep: Tensor | None,
    lengths: Tensor,
    first: Tensor,
    *_: object,
) -> tuple[Tensor, ...]:
    D = first.shape[0]
    H, K, r = linear.shape
    kept = bias.new_empty((0, 0, 0) if log_keep is None else log_keep.shape)
    states = bias.new_empty((D, H, val.shape[3] + 1, K))
    return *_like(q, k, val), states, bias.new_empty((H, 2 * r + 1, K)), kept


@torch.library.custom_op("gma::write_backward", mutates_args=())
def write_backward(
    d_after: Tensor,
    k: Tensor,
    val: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    bias: Tensor,
    lengths: Tensor,
    document: Tensor,
    normalize: bool,
    cut: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of k, val and the mixture."""
    mixture = contiguous(linear, quadratic, bias)
    k, val = unit_stride(k, val)
    launcher = _launcher_of(k, bias.shape[1], val.shape[3], normalize, cut)
    k_scores, d_val, _ = _key_gradients(
        launcher, None, k, val, Units(), mixture, lengths, document, d_after
    )
    (d_k,), d_mixture = _score_gradients(launcher, mixture, lengths, (k, k_scores))
    return d_k, d_val, d_mixture


@write_backward.register_fake
def _(d_after: Tensor, k: Tensor, val: Tensor, linear: Tensor, *_: object) -> tuple[Tensor, ...]:
    H, K, r = linear.shape
    return *_like(k, val), linear.new_empty((H, 2 * r + 1, K))


@torch.library.custom_op("gma::read_backward", mutates_args=())
def read_backward(
    d_out: Tensor,
    q: Tensor,
    states: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, states (D, H, v + 1, K) and the mixture."""
    mixture = contiguous(linear, quadratic, bias)
    (q,) = unit_stride(q)
    v, K = states.shape[2] - 1, states.shape[3]
    launcher = _launcher_of(q, K, v, normalize, cut)
    q_scores, _, _, sums, _ = _query_gradients(
        launcher, q, None, None, Units(), mixture, lengths, document, states, d_out.contiguous(),
        epsilon,
    )  # fmt: skip
    d_states = _suffixes(launcher, Sums(sums, None), None, first, count)
    (d_q,), d_mixture = _score_gradients(launcher, mixture, lengths, (q, q_scores))
    return d_q, d_states, d_mixture


@read_backward.register_fake
def _(d_out: Tensor, q: Tensor, states: Tensor, linear: Tensor, *_: object) -> tuple[Tensor, ...]:
    H, K, r = linear.shape
    return *_like(q, states), linear.new_empty((H, 2 * r + 1, K))


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return what `backward.query_gradients` stores; it is causal if there is no document."""
    d_scores = _new_scores(launcher, q)
    inverse, pull = q.new_empty((2, *q.shape[:3]), dtype=torch.float32)
    sums = q.new_empty(launcher.sums_shape, dtype=torch.float32)
    ends = None if units.left is None else torch.empty_like(sums)
    launcher.over_segments(
        backward.query_gradients, q=q, k=k, val=val, **units.arguments, **mixture._asdict(),
        lengths=lengths, document=document, states=states, d_out=d_out, d_scores=d_scores,
        inverse=inverse, pull=pull, sums=sums, ends=ends, epsilon=epsilon,
        CAUSAL=document is None,
    )  # fmt: skip
    return d_scores, inverse, pull, sums, ends


def _suffixes(
    launcher: Launcher, sums: Sums, after: Tensor | None, first: Tensor, count: Tensor
) -> Tensor:
    """Put what comes after each segment in the place of its sum; return what is before all.

    after (D, H, v + 1, K): what comes after the documents, nothing if None.
    """
    shape = len(first), *sums.sums.shape[1:]
    before = sums.sums.new_empty(shape)
    launcher.over_documents(
        scans.suffix, len(first), **sums.arguments,
        after=sums.sums.new_zeros(shape) if after is None else after, before=before,
        first_row=first, row_count=count,
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
    d_out: Tensor | None = None,
    inverse: Tensor | None = None,
    pull: Tensor | None = None,
    ends: Tensor | None = None,
    epsilon: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `backward.key_gradients` stores; it is causal if there is no document."""
    d_scores = _new_scores(launcher, k)
    d_val = val.new_empty(val.shape)
    shape = (0, 0, 0) if units.left is None else k.shape[:3]
    d_log_keep = k.new_empty(shape, dtype=torch.float32)
    launcher.over_segments(
        backward.key_gradients, q=q, k=k, val=val, **units.arguments, **mixture._asdict(),
        lengths=lengths, document=document, d_states=d_states, ends=ends, d_out=d_out,
        inverse=inverse, pull=pull, d_scores=d_scores, d_val=d_val, d_log_keep=d_log_keep,
        epsilon=epsilon, CAUSAL=document is None,
    )  # fmt: skip
    return d_scores, d_val, d_log_keep


def _new_scores(launcher: Launcher, x: Tensor) -> Tensor:
    """Room for gradients of the scores of x, (R, C, H, K): float16 would lose small ones."""
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    return x.new_empty((*x.shape[:3], launcher.shape.K), dtype=dtype)


def _score_gradients(
    launcher: Launcher, mixture: Coefficients, lengths: Tensor, *scored: tuple[Tensor, Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Take tokens, and gradients of their scores, to gradients of the tokens and of the mixture.

    The mixture's (H, 2 r + 1, K) are those of linear, quadratic and bias, one below the other.
    """
    R, C, H, r, K, _ = launcher.shape
    row_blocks = -(-C // launcher.cut.block)
    # Each program's share of the mixture's gradients, summed in an order that never changes.
    programs = min(R * row_blocks, -(-ENOUGH // H))
    shares = mixture.bias.new_empty((len(scored), programs, H, 2 * r + 1, K))
    found = []
    for (x, d_scores), own in zip(scored, shares, strict=True):
        d_x = x.new_empty(x.shape)
        launch(
            scores.score_gradients, (programs, H), x=x, d_scores=d_scores,
            linear=mixture.linear, quadratic=mixture.quadratic, lengths=lengths, d_x=d_x,
            d_mixture=own, C=C, blocks=R * row_blocks, row_blocks=row_blocks, H=H, R=r, K=K,
            **launcher.tuned,
        )  # fmt: skip
        found.append(d_x)
    return found, shares.sum((0, 1))
