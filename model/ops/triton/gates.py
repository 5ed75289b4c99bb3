"""The gates of a mixer that forgets, as its Triton kernels multiply by them.

Within a block of tokens everything is in units of what its first token finds: a write is divided by
what was kept from there up to it, so that a read multiplies by nothing, and only what leaves the
block is multiplied by all that it keeps.

Shapes: R rows of C tokens, H heads, B tokens of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_weights(
    rate, strength, times, grown, left, row, block, C,
    H: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store what a block is computed with, see `weigh`, of what its tokens' heads forget and write.

    rate and strength (B, HEADS): 0 where no token is.
    """
    token = block * BLOCK + tl.arange(0, BLOCK)
    head = tl.arange(0, HEADS)
    own = tl.exp(tl.cumsum(rate, 0))
    inside = (token < C)[:, None] & (head < H)[None, :]
    at = (row * H + head)[None, :] * C + token[:, None]
    tl.store(times + at, strength * own, mask=inside)
    tl.store(grown + at, own, mask=inside)
    at_block = (row * H + head) * tl.cdiv(C, BLOCK) + block
    tl.store(left + at_block, tl.exp(-tl.sum(rate, 0)), mask=head < H)


@triton.jit
def weigh(
    log_keep, strength, lengths, times, grown, left, C,
    H: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store what blocks are computed with, of log_keep and strength (R, C, H), contiguous.

    times (R, H, C): what a token's write is multiplied by; grown (R, H, C): one over what is kept
    from the block's beginning up to it, the token included; left (R, H, blocks): what is kept of
    what a block finds. HEADS is the power of two from H.
    """
    blocks = tl.cdiv(C, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    token = block * BLOCK + tl.arange(0, BLOCK)
    head = tl.arange(0, HEADS)
    there = (token < tl.load(lengths + row))[:, None] & (head < H)[None, :]
    at = (row * C + token)[:, None] * H + head[None, :]
    rate = -tl.load(log_keep + at, mask=there, other=0.0)
    own = tl.load(strength + at, mask=there, other=0.0)
    store_weights(rate, own, times, grown, left, row, block, C, H, HEADS, BLOCK)
