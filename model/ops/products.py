"""Matrix products that do on their way what else would cost a pass over memory.

A row's RMS normalisation is a factor of its products, so it is one number a row that the epilogue
multiplies by; so are the scales of float8. GELU and the addition to what is already there are done
to the accumulator. Tiles come through the tensor memory accelerator; one program a multiprocessor
takes tile after tile, so that the end of one overlaps with the beginning of the next.

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.ops.kernels import INTERPRETED

ALIGNMENT = 16
"""Bytes that a row of each matrix must be a multiple of."""


@triton.jit
def _gelu(x):
    """GELU with tanh, of float32, in float16: its error is below that of rounding to bfloat16.

    x * (1 + tanh(x * (a + b * x * x))) / 2 with a = sqrt(2 / pi), b = .044715 * a. Two elements an
    instruction: in float32 this would cost a tenth of the whole product.
    """
    if INTERPRETED:
        u = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
        return x * tl.sigmoid(2.0 * u)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 x, u, a, b, half;
            cvt.rn.f16x2.f32 x, $2, $1;
            mov.b32 a, 0x3a623a62;
            mov.b32 b, 0x28912891;
            mov.b32 half, 0x38003800;
            mul.rn.f16x2 u, x, x;
            fma.rn.f16x2 u, u, b, a;
            mul.rn.f16x2 u, u, x;
            tanh.approx.f16x2 u, u;
            fma.rn.f16x2 u, u, half, half;
            mul.rn.f16x2 $0, u, x;
            }""",
            "=r,f,f",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )


@triton.jit
def _tile_product(a, weight, m, n, inner, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """A tile (BM, BN) of a @ weight.T in float32."""
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(tl.cdiv(inner, BK)):
        x = a.load([m, k * BK])
        w = weight.load([n, k * BK])
        if INTERPRETED:
            x, w = x.to(tl.float32), w.to(tl.float32)
        total = tl.dot(x, w.T, total)
    return total


@triton.jit
def _finish(total, out, m, n, GELU: tl.constexpr, ADD: tl.constexpr):
    """Store a tile; the squares' sums (BM,) of what was stored."""
    if ADD:
        total += out.load([m, n]).to(tl.float32)
    if GELU:
        total = _gelu(total)
    stored = total.to(out.dtype)
    out.store([m, n], stored)
    wide = stored.to(tl.float32)
    return tl.sum(wide * wide, 1)


@triton.jit
def _product(
    a, weight, out, factor, squares, squares_out, alpha, tokens, outputs, inner, width, epsilon,
    parts, PROGRAMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    FACTOR: tl.constexpr, PARTS: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(tokens, BM)
    tiles_n = tl.cdiv(outputs, BN)
    group = GROUP * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        # Neighbours share their tiles of a and weight while those are in cache.
        first = tile // group * GROUP
        deep = min(tiles_m - first, GROUP)
        tile_m = first + tile % group % deep
        tile_n = tile % group // deep
        m, n = tile_m * BM, tile_n * BN
        total = _tile_product(a, weight, m, n, inner, BM, BN, BK)
        token = m + tl.arange(0, BM)
        there = token < tokens
        if PARTS:
            part = tl.arange(0, PARTS)
            at = token.to(tl.int64)[:, None] * parts + part[None, :]
            of_token = tl.load(squares + at, mask=there[:, None] & (part < parts)[None, :], other=0)
            total *= (alpha * tl.rsqrt(tl.sum(of_token, 1) / width + epsilon))[:, None]
        elif FACTOR:
            total *= (alpha * tl.load(factor + token, mask=there, other=0.0))[:, None]
        else:
            total *= alpha
        halves = tl.permute(tl.reshape(total, (BM, 2, BN // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        sums = _finish(left, out, m, n, GELU, ADD)
        sums += _finish(right, out, m, n + BN // 2, GELU, ADD)
        if ADD:
            tl.store(squares_out + token.to(tl.int64) * tiles_n + tile_n, sums, mask=there)


class Tiles(NamedTuple):
    """How a product is cut."""

    m: int
    n: int
    warps: int
    stages: int
    programs: int  # of a multiprocessor

    @classmethod
    def of(cls, tokens: int, outputs: int, multiprocessors: int, *, gelu: bool) -> Tiles:
        """The largest that still give each multiprocessor one."""
        large = [cls(128, 128, 4, 3, 2)] if gelu else [cls(128, 256, 8, 3, 1)]
        small = [cls(128, 128, 4, 3, 2), cls(64, 128, 4, 3, 2), cls(64, 64, 4, 3, 2)]
        for tiles in (*large, *small):
            n = min(tiles.n, max(64, triton.next_power_of_2(outputs)))
            if n == tiles.n and -(-tokens // tiles.m) * -(-outputs // n) >= multiprocessors:
                return tiles
        return small[-1]


class Squares(NamedTuple):
    """Sums of squares of rows of `width`, in parts, which a product normalises its inputs by."""

    sums: Tensor  # (N, parts) float32
    width: int
    epsilon: float


def parts(tokens: int, outputs: int, multiprocessors: int) -> int:
    """Into how many parts `multiply` with `add` sums the squares of a row."""
    return -(-outputs // Tiles.of(tokens, outputs, multiprocessors, gelu=False).n)


def multiply(
    a: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    multiprocessors: int,
    alpha: float = 1.0,
    factor: Tensor | None = None,
    normalize: Squares | None = None,
    gelu: bool = False,
    squares: Tensor | None = None,
) -> None:
    """out = alpha * a @ weight.T, or what else is asked for; a (N, I), weight (O, I), out (N, O).

    factor: (N,) float32, of each row. normalize: a's rows are divided by their root mean squares.
    gelu: of the product. squares: add to out instead, and put the squares of its rows there,
    (N, parts) float32. a and weight are of one dtype, bfloat16 or float8_e4m3fn. All are contiguous
    with rows of a multiple of 16 bytes.
    """
    tokens, inner = a.shape
    outputs = len(weight)
    tiles = Tiles.of(tokens, outputs, multiprocessors, gelu=gelu)
    depth = 128 // a.element_size()
    count = -(-tokens // tiles.m) * -(-outputs // tiles.n)
    programs = min(tiles.programs * multiprocessors, count)
    in_parts = normalize.sums.shape[1] if normalize else 0
    nothing = out
    _product[(programs,)](
        TensorDescriptor.from_tensor(a, [tiles.m, depth]),
        TensorDescriptor.from_tensor(weight, [tiles.n, depth]),
        TensorDescriptor.from_tensor(out, [tiles.m, tiles.n // 2]),
        nothing if factor is None else factor,
        normalize.sums if normalize else nothing,
        nothing if squares is None else squares,
        alpha, tokens, outputs, inner,
        normalize.width if normalize else 1,
        normalize.epsilon if normalize else 0.0,
        in_parts, PROGRAMS=programs, BM=tiles.m, BN=tiles.n, BK=depth, GROUP=8,
        FACTOR=factor is not None, PARTS=triton.next_power_of_2(in_parts) if in_parts else 0,
        GELU=gelu, ADD=squares is not None, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def aligned(size: int, dtype: torch.dtype) -> bool:
    """Whether rows of `size` elements can be read and written by `multiply`."""
    return size * dtype.itemsize % ALIGNMENT == 0
