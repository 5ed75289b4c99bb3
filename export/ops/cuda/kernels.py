"""Triton kernels that the library needs beside the model's own.

Shapes: R rows of C tokens, D documents, W width, T tail, H heads, r routing_dim, K components, G
segments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gma.model.ops.triton.device import head_mixture, locate, posterior


@triton.jit
def place(
    lengths, document_of_row, known_lengths, first_row, row_count, R, D, C, ROWS: tl.constexpr
):  # fmt: skip
    """Find each document's first_row and row_count (D,), and known_lengths (R,), int32.

    Whatever lengths and document_of_row (R,) hold, what is written points into the step: lengths
    are cut to 0 to C, and a row of no known document is not used.
    """
    program = tl.program_id(0)
    row = tl.arange(0, ROWS)
    first = R + tl.zeros((ROWS,), tl.int32)
    count = tl.zeros((ROWS,), tl.int32)
    for start in range(0, R, ROWS):
        here = start + row < R
        length = tl.load(lengths + start + row, mask=here, other=0)
        document = tl.load(document_of_row + start + row, mask=here, other=-1)
        used = (length > 0) & (document >= 0) & (document < D)
        own = used & (document == program)
        first = tl.minimum(first, tl.where(own, start + row, R))
        count += own.to(tl.int32)
        if start == program * ROWS:
            known = tl.where(used, tl.minimum(length, C), 0)
            tl.store(known_lengths + start + row, known.to(tl.int32), mask=here)
    if program < D:
        rows = tl.sum(count, 0)
        tl.store(first_row + program, tl.where(rows > 0, tl.min(first, 0), 0))
        tl.store(row_count + program, rows)


@triton.jit
def count(
    k, linear, quadratic, bias, lengths, counts, k_row, k_token, k_head, C, segments,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Sum the responsibilities of each segment's keys k (R, C, H, r): counts (G, H, K)."""
    head, row, first, here, _ = locate(tl.program_id(0), lengths, segments, C, SEGMENT, H)
    mixture = head_mixture(linear, quadratic, bias, head, K, R)
    token = tl.arange(0, BLOCK)
    k += row * k_row + first.to(tl.int64) * k_token + head * k_head
    k += token[:, None] * k_token + tl.arange(0, R)[None, :]
    total = tl.zeros((K,), tl.float32)
    for start in range(0, here, BLOCK):
        there = start + token < here
        x = tl.load(k, mask=there[:, None], other=0.0)
        weights, sums = posterior(x, mixture[0], mixture[1], mixture[2], NORMALIZE, EPSILON)
        total += tl.sum(weights * tl.where(there, 1.0 / sums, 0.0)[:, None], 0)
        k += BLOCK * k_token
    tl.store(counts + tl.program_id(0).to(tl.int64) * K + tl.arange(0, K), total)


@triton.jit
def add_counts(counts, usage, segments, H: tl.constexpr, K: tl.constexpr):
    """usage (R, H, K) is the sum of the counts (G, H, K) of each row's segments."""
    row = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    component = tl.arange(0, K)
    total = tl.zeros((K,), tl.float32)
    for segment in range(segments):
        total += tl.load(counts + ((row * segments + segment) * H + head) * K + component)
    tl.store(usage + tl.program_id(0).to(tl.int64) * K + component, total)


@triton.jit
def scale_taps(taps, scale, scaled, T, width, WIDTH: tl.constexpr):
    """Write scaled (4, W): taps (T + 1, W) times scale (W,), after zeros."""
    tap = tl.program_id(0)
    here = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = here < width
    own = inside & (tap >= 3 - T)
    factor = tl.load(scale + here, mask=own, other=0.0)
    row = factor * tl.load(taps + (tap - 3 + T) * width + here, mask=own, other=0.0)
    tl.store(scaled + tap * width + here, row.to(scaled.dtype.element_ty), mask=inside)


@triton.jit
def finish(y, residual, count, BLOCK: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr):
    """Change y (count,) in place: GELU in its tanh form, then plus the residual."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    x = tl.load(y + at, mask=here, other=0.0).to(tl.float32)
    if GELU:
        x *= tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    if ADD:
        x += tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
    tl.store(y + at, x.to(y.dtype.element_ty), mask=here)
