"""What Triton's kernels have in common: products, the posterior of a mixture, places.

Squares and scores are exact to about 2^-16 with bfloat16 and float16 inputs: a bfloat16's square, a
float16, and nearly so a weight, is the sum of two bfloat16s. Sums and states are float32.

Shapes: B tokens of a block, r routing_dim, K components, v value_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter multiplies the bits of bfloat16s.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc=None):
    """a @ b + acc in float32, where a and b are of one dtype."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def head_mixture(linear, quadratic, bias, head, K: tl.constexpr, R: tl.constexpr):
    """A head's mixture for scores in units of log 2: (r, K), (r, K) and (K,), float32."""
    component = tl.arange(0, K)
    at = (head * K + component)[None, :] * R + tl.arange(0, R)[:, None]
    scale: tl.constexpr = 1.4426950408889634
    return (
        tl.load(linear + at) * scale,
        tl.load(quadratic + at) * scale,
        tl.load(bias + head * K + component) * scale,
    )


@triton.jit
def split(x):
    """Two bfloat16s whose sum is x to 16 bits.

    The first is cut, not rounded: that takes no conversion, of which the device does few at a time.
    """
    high = (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def factor(x, tokens):
    """x as it is multiplied: bfloat16 beside bfloat16 tokens, else float32 (float16 overflows)."""
    return x.to(tl.bfloat16) if tokens.dtype == tl.bfloat16 else x.to(tl.float32)


@triton.jit
def dot_all(a, b):
    """a @ b with all digits of b (float32), whatever a is."""
    if a.dtype == tl.bfloat16:
        high, low = split(b)
        product = dot(a, low, dot(a, high))
    else:
        product = dot(a, b)
    return product


@triton.jit
def split_dot(a, b):
    """a @ b of float32s, to 16 bits of each."""
    a_high, a_low = split(a)
    b_high, b_low = split(b)
    both = dot(a_high, b_high)
    both = dot(a_low, b_high, both)
    return dot(a_high, b_low, both)


@triton.jit
def posterior(x, linear, quadratic, bias, NORMALIZE: tl.constexpr, EPSILON: tl.constexpr):
    """x (B, r) -> responsibilities (B, K) float32, not normalised, and their sums (B,)."""
    wide = x.to(tl.float32)
    square = wide * wide
    if x.dtype == tl.bfloat16:
        linear_high, linear_low = split(linear)
        first = dot(x, linear_high)
        first = dot(x, linear_low, first)
        second = split_dot(square, quadratic)
    elif x.dtype == tl.float16:
        first = split_dot(wide, linear)
        second = split_dot(square, quadratic)
    else:
        first = dot(wide, linear)
        second = dot(square, quadratic)
    if NORMALIZE:
        # One factor for both: it crosses from one layout of registers to another.
        root = tl.rsqrt(tl.sum(square, 1) / x.shape[1] + EPSILON)[:, None]
        scores = root * (first + second * root) + bias[None, :]
    else:
        scores = first + second + bias[None, :]
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights, tl.sum(weights, 1)


@triton.jit
def backwards():
    """Return the program's place, counted from the last.

    What goes through memory backwards finds in the cache what was written last before it.
    """
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def locate(place, lengths, segments, C, SEGMENT: tl.constexpr, H: tl.constexpr):
    """Find a place's head, row and first token, how many tokens are there, and in the row.

    Neighbouring places are one segment's heads, for those lie side by side in memory: what one
    reads brings the next one's half of a cache line along.
    """
    head = (place % H).to(tl.int64)
    row = place // H // segments
    first = place // H % segments * SEGMENT
    here = tl.minimum(tl.maximum(tl.load(lengths + row).to(tl.int32) - first, 0), SEGMENT)
    return head, row.to(tl.int64), first, here, tl.minimum(C - first, SEGMENT)


@triton.jit
def one_each(at, there, ALL: tl.constexpr):
    """Load a number of each token, with zeros for those that are not there."""
    return tl.load(at) if ALL else tl.load(at, mask=there, other=0.0)


@triton.jit
def load(at, there, ALL: tl.constexpr):
    """Load tokens' rows, with zeros for those that are not there."""
    return tl.load(at) if ALL else tl.load(at, mask=there[:, None], other=0.0)


@triton.jit
def store(at, rows, there, ALL: tl.constexpr):
    """Store the rows of tokens that are there."""
    if ALL:
        tl.store(at, rows)
    else:
        tl.store(at, rows, mask=there[:, None])
