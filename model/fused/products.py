"""Matrix products that do on their way what else would cost a pass over memory.

A row's RMS normalisation is a factor of its products, so it is one number a row that the epilogue
multiplies by; so are the scales of float8. GELU, and the addition to what is already there, are
done to the accumulator. Tiles come through the tensor memory accelerator; each program takes tile
after tile, so that the end of one overlaps with the beginning of the next.

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gma.model.ops.triton.device import INTERPRETED, dot
from gma.model.ops.triton.launch import launch


@triton.jit
def _gelu(x, EXACT: tl.constexpr):
    """Compute GELU with tanh, of float32, in float16: less is lost than by rounding to bfloat16.

    x * (1 + tanh(x * (a + b * x * x))) / 2 with a = sqrt(2 / pi), b = .044715 * a. Two elements an
    instruction, for a device takes few of tanh at a time. With EXACT in float32.
    """
    if INTERPRETED or EXACT:
        u = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
        gelu = x * tl.sigmoid(2.0 * u)
    else:
        gelu = tl.inline_asm_elementwise(
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
    return gelu


@triton.jit
def _tile_product(a, weight, m, n, depth, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Compute a tile (BM, BN) of a @ weight.T in float32."""
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(depth):
        x = a.load([m, k * BK])
        w = weight.load([n, k * BK])
        total = dot(x, w.T, total)
    return total


@triton.jit
def _finish(total, out, m, n, GELU: tl.constexpr, ADD: tl.constexpr):
    if ADD:
        total += out.load([m, n]).to(tl.float32)
    if GELU:
        total = _gelu(total, out.dtype == tl.float32)
    out.store([m, n], total.to(out.dtype))


@triton.jit
def product(
    a, weight, out, factor, alpha, tokens, outputs, inner, PROGRAMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    FACTOR: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(tokens, BM)
    tiles_n = tl.cdiv(outputs, BN)
    group = GROUP * tiles_n
    depth = tl.cdiv(inner, BK)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        # Neighbours share their tiles of a and weight while those are in cache.
        first = tile // group * GROUP
        deep = min(tiles_m - first, GROUP)
        tile_m = first + tile % group % deep
        tile_n = tile % group // deep
        m, n = tile_m * BM, tile_n * BN
        total = _tile_product(a, weight, m, n, depth, BM, BN, BK)
        if FACTOR:
            token = m + tl.arange(0, BM)
            total *= (alpha * tl.load(factor + token, mask=token < tokens, other=0.0))[:, None]
        else:
            total *= alpha
        left, right = tl.split(tl.permute(tl.reshape(total, (BM, 2, BN // 2)), (0, 2, 1)))
        _finish(left, out, m, n, GELU, ADD)
        _finish(right, out, m, n + BN // 2, GELU, ADD)


class Tiles(NamedTuple):
    """How a product is cut."""

    m: int
    n: int
    warps: int
    stages: int
    programs: int  # of a multiprocessor

    @classmethod
    def of(
        cls,
        tokens: int,
        outputs: int,
        multiprocessors: int,
        *,
        gelu: bool,
        add: bool = False,
        wide: bool = False,
    ) -> Tiles:
        """Choose the largest that still give each multiprocessor one; `wide`: of float32."""
        # What is added to takes the shared memory of a stage.
        large = [cls(128, 128, 4, 3, 2) if gelu else cls(128, 256, 8, 3 if add else 4, 1)]
        if wide:
            large = [cls(128, 128, 8, 2, 1)]
        small = [cls(128, 128, 4, 3, 2), cls(64, 128, 4, 3, 2), cls(64, 64, 4, 3, 2)]
        for tiles in (*large, *small):
            n = min(tiles.n, max(64, triton.next_power_of_2(outputs)))
            if n == tiles.n and -(-tokens // tiles.m) * -(-outputs // n) >= multiprocessors:
                return tiles
        return small[-1]


def multiply(
    a: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    multiprocessors: int,
    alpha: float = 1.0,
    factor: Tensor | None = None,
    gelu: bool = False,
    add: bool = False,
) -> None:
    """Compute out = gelu(factor * alpha * a @ weight.T); a (N, I), weight (O, I), out (N, O).

    factor: (N,) float32, a factor for each row. add: add to out, instead of writing over it. a and
    weight are of one dtype, float32, bfloat16 or float8_e4m3fn. All are contiguous, with rows of a
    multiple of 16 bytes. However it is cut, each number is a sum of the inputs in their order.
    """
    tokens, inner = a.shape
    outputs = len(weight)
    wide = a.element_size() > 2
    tiles = Tiles.of(tokens, outputs, multiprocessors, gelu=gelu, add=add, wide=wide)
    depth = 128 // a.element_size()
    count = -(-tokens // tiles.m) * -(-outputs // tiles.n)
    programs = min(tiles.programs * multiprocessors, count)
    launch(
        product, (programs,),
        a=TensorDescriptor.from_tensor(a, [tiles.m, depth]),
        weight=TensorDescriptor.from_tensor(weight, [tiles.n, depth]),
        out=TensorDescriptor.from_tensor(out, [tiles.m, tiles.n // 2]),
        factor=out if factor is None else factor,
        alpha=alpha, tokens=tokens, outputs=outputs, inner=inner, PROGRAMS=programs,
        BM=tiles.m, BN=tiles.n, BK=depth, GROUP=8,
        FACTOR=factor is not None, GELU=gelu, ADD=add,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
