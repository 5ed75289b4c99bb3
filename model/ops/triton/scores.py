"""The Triton kernel from the gradients of scores to those of what they are scores of.

Shapes: as in `gma.model.ops.triton.forward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gma.model.ops.triton.device import dot, dot_all, factor


@triton.jit
def score_gradients(
    x, d_scores, linear, quadratic, lengths, d_x, d_mixture, x_row, x_token, x_head, C,
    blocks, row_blocks,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, EPSILON: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of scores (R, C, H, K) -> of queries or keys (R, C, H, r) and of the mixture.

    d_x is contiguous. d_mixture (P, H, 2 r + 1, K): each of P programs' share of the gradients of
    linear, quadratic and bias, one below the other.
    """
    head = tl.program_id(1).to(tl.int64)
    token = tl.arange(0, BLOCK)
    component = tl.arange(0, K)
    routing = tl.arange(0, R)
    weights_at = (head * K + component)[:, None] * R + routing[None, :]
    A = tl.load(linear + weights_at)
    B = tl.load(quadratic + weights_at)
    x += head * x_head
    x_at = token[:, None] * x_token + routing[None, :]
    scores_at = token[:, None] * (H * K) + component[None, :]
    d_x_at = token[:, None] * (H * R) + routing[None, :]
    d_linear = tl.zeros((R, K), tl.float32)
    d_quadratic = tl.zeros((R, K), tl.float32)
    d_bias = tl.zeros((K,), tl.float32)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
        row = (block // row_blocks).to(tl.int64)
        first = (block % row_blocks * BLOCK).to(tl.int64)
        there = first + token < tl.load(lengths + row)
        at = (row * C + first) * H + head
        own = tl.load(x + row * x_row + first * x_token + x_at, mask=there[:, None], other=0.0)
        scores = tl.load(d_scores + at * K + scores_at, mask=there[:, None], other=0.0)
        unit = own.to(tl.float32)
        if NORMALIZE:
            scale = 1.0 / tl.sqrt(tl.sum(unit * unit, 1) / R + EPSILON)
            unit = unit * scale[:, None]
        # All digits: mu / var and x / var nearly cancel where a component is narrow.
        d_unit = dot_all(scores, A) + 2.0 * unit * dot_all(scores, B)
        if NORMALIZE:
            along = tl.sum(d_unit * unit, 1) / R
            d_unit = scale[:, None] * (d_unit - unit * along[:, None])
        inside = first + token < C
        tl.store(d_x + at * R + d_x_at, d_unit.to(d_x.dtype.element_ty), mask=inside[:, None])
        d_linear = dot(tl.trans(factor(unit, own)), scores, d_linear)
        d_quadratic = dot(tl.trans(factor(unit * unit, own)), scores, d_quadratic)
        d_bias += tl.sum(scores.to(tl.float32), 0)
    d_mixture += (tl.program_id(0).to(tl.int64) * H + head) * (2 * R + 1) * K
    share_at = routing[:, None] * K + component[None, :]
    tl.store(d_mixture + share_at, d_linear)
    tl.store(d_mixture + R * K + share_at, d_quadratic)
    tl.store(d_mixture + 2 * R * K + component, d_bias)
