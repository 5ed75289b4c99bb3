"""A Triton kernel that counts what rows' tokens take of each component.

Shapes: R rows of C tokens, H heads, r routing_dim, K components.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gma.model.ops.triton.device import head_mixture, posterior


@triton.jit
def count(
    k, linear, quadratic, bias, lengths, usage, k_row, k_token, k_head, usage_row,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, EPSILON: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """usage (R, H, K), float32: see `gma.model.ops.chunked.usage`. A program for each head of each
    row; none is long, for a row is a chunk."""
    row = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    here = tl.load(lengths + row).to(tl.int32)
    token = tl.arange(0, BLOCK)
    component = tl.arange(0, K)
    A, B, b = head_mixture(linear, quadratic, bias, head, K, R)
    k += row * k_row + head * k_head
    k += token[:, None] * k_token + tl.arange(0, R)[None, :]
    total = tl.zeros((K,), tl.float32)
    for start in tl.range(0, here, BLOCK, num_stages=STAGES):
        there = start + token < here
        keys = tl.load(k, mask=there[:, None], other=0.0)
        weights, sums = posterior(keys, A, B, b, NORMALIZE, EPSILON)
        total += tl.sum(weights * tl.where(there, 1.0 / sums, 0.0)[:, None], 0)
        k += BLOCK * k_token
    tl.store(usage + row * usage_row + head * K + component, total)
