"""What a step does token by token beside its products and mixers: one pass over memory each.

Shapes: R rows of C tokens, N = R * C, D documents, S slots, L layers, W width, T tail. Documents
and rows are those of a step: a document's rows stand together, all but its last full.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def embed(tokens, table, x, width, WIDTH: tl.constexpr):
    """x (N, W) from ids (N,) and table (V, W)."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    there = at < width
    row = tl.load(table + tl.load(tokens + token).to(tl.int64) * width + at, mask=there)
    tl.store(x + token * width + at, row, mask=there)


@triton.jit
def normalize(x, normal, width, epsilon, count, WIDTH: tl.constexpr, TOKENS: tl.constexpr):
    """normal (N, W) is x (N, W) divided by its rows' root mean squares."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    at = token[:, None] * width + tl.arange(0, WIDTH)[None, :]
    there = (token < count)[:, None] & (tl.arange(0, WIDTH) < width)[None, :]
    row = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(row * row, 1) / width + epsilon)
    tl.store(normal + at, (row * inverse[:, None]).to(normal.dtype.element_ty), mask=there)


@triton.jit
def convolve(
    x, tail, norm, taps, lengths, document, first_row, slots, fresh, y, inverse, normal,
    C, width, epsilon, tail_slot, T: tl.constexpr,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, NORMAL: tl.constexpr,
):  # fmt: skip
    """y (N, W) is x plus the short convolution of x's normalised rows, and `inverse` (N,) one over
    y's rows' root mean squares; with NORMAL, normal (N, W) is y normalised.

    norm (W,) weighs x's normalised rows, taps (T + 1, W) are the convolution's, tail (S, ., T, W)
    at the layer. What comes before a row is its document's row before, or its document's tail.
    """
    row = tl.program_id(0) // tl.cdiv(C, TOKENS)
    first = tl.program_id(0) % tl.cdiv(C, TOKENS) * TOKENS
    here = tl.arange(0, WIDTH)
    inside = here < width
    token = first + tl.arange(0, TOKENS)
    belongs = tl.load(document + row)
    used = tl.load(lengths + row) > 0
    continues = used & (tl.load(first_row + belongs) < row)
    scale = tl.load(norm + here, mask=inside, other=0.0)
    base = (row.to(tl.int64) * C + token)[:, None]
    exists = (token < C)[:, None] & inside[None, :]
    own = tl.load(x + base * width + here[None, :], mask=exists, other=0.0).to(tl.float32)
    total = own
    for tap in tl.static_range(T + 1):
        back = T - tap
        weight = tl.load(taps + tap * width + here, mask=inside, other=0.0)
        if back == 0:
            seen = own
        else:
            reachable = exists & ((token >= back) | continues)[:, None]
            at = (base - back) * width + here[None, :]
            seen = tl.load(x + at, mask=reachable, other=0.0).to(tl.float32)
        root = tl.rsqrt(tl.sum(seen * seen, 1) / width + epsilon)
        total += seen * root[:, None] * (weight * scale)[None, :]
        if back > 0:
            if (first < T) & used & (not continues):
                slot = tl.load(slots + belongs).to(tl.int64)
                old = (tl.load(fresh + belongs) == 0) & (token < back)[:, None] & inside[None, :]
                at = slot * tail_slot + (token + tap)[:, None] * width + here[None, :]
                total += tl.load(tail + at, mask=old, other=0.0) * weight[None, :]
    stored = total.to(y.dtype.element_ty)
    tl.store(y + base * width + here[None, :], stored, mask=exists)
    wide = stored.to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide, 1) / width + epsilon)
    tl.store(inverse + row.to(tl.int64) * C + token, root, mask=token < C)
    if NORMAL:
        at = base * width + here[None, :]
        tl.store(normal + at, (wide * root[:, None]).to(normal.dtype.element_ty), mask=exists)


@triton.jit
def remember(
    x, tail, norm, lengths, document, first_row, row_count, slots, fresh,
    C, width, epsilon, tail_slot, T: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Put the convolution's last inputs of each document into its tail (S, ., T, W), in place."""
    row = tl.program_id(0)
    belongs = tl.load(document + row)
    first = tl.load(first_row + belongs)
    length = tl.load(lengths + row)
    if (length > 0) & (row == first + tl.load(row_count + belongs) - 1):
        here = tl.arange(0, WIDTH)
        inside = here < width
        depth = tl.arange(0, DEPTH)
        place = (length - T + depth).to(tl.int64)
        wanted = (depth < T)[:, None] & inside[None, :]
        reachable = wanted & ((place >= 0) | (first < row))[:, None]
        at = (row.to(tl.int64) * C + place)[:, None] * width + here[None, :]
        seen = tl.load(x + at, mask=reachable, other=0.0).to(tl.float32)
        root = tl.rsqrt(tl.sum(seen * seen, 1) / width + epsilon)
        scale = tl.load(norm + here, mask=inside, other=0.0)
        tail += tl.load(slots + belongs).to(tl.int64) * tail_slot
        old = tl.load(fresh + belongs) == 0
        before = wanted & ((place < 0) & (first == row) & old)[:, None]
        at = (place + T)[:, None] * width + here[None, :]
        own = tl.load(tail + at, mask=before, other=0.0) + seen * root[:, None] * scale[None, :]
        # All of the old tail is read before any of the new one is written.
        tl.debug_barrier()
        tl.store(tail + depth[:, None] * width + here[None, :], own, mask=wanted)


@triton.jit
def score(
    deep, bias, tokens, table, lengths, shares, C, labels, deep_stride,
    LABELS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """What each block of TOKENS says: shares (R, blocks, labels), sums of its tokens' scores.

    deep (N, deep_stride): a reading for each label, then the gate's. table (V, labels) has the
    tokens' own scores.
    """
    blocks = tl.cdiv(C, TOKENS)
    row = tl.program_id(0) // blocks
    token = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    there = token < tl.load(lengths + row)
    label = tl.arange(0, LABELS)
    inside = there[:, None] & (label < labels)[None, :]
    at = row.to(tl.int64) * C + token
    id_ = tl.load(tokens + at, mask=there, other=0).to(tl.int64)
    reading = tl.load(deep + at[:, None] * deep_stride + label[None, :], mask=inside, other=0.0)
    reading += tl.load(bias + label, mask=label < labels, other=0.0)[None, :]
    gate = tl.load(deep + at * deep_stride + labels, mask=there, other=0.0)
    gate += tl.load(bias + labels)
    # softplus, which is the identity where exp would overflow
    open_ = tl.where(gate > 20.0, gate, tl.log(1.0 + tl.exp(tl.minimum(gate, 20.0))))
    own = tl.load(table + id_[:, None] * labels + label[None, :], mask=inside, other=0.0)
    scores = tl.where(inside, reading * open_[:, None] + own.to(tl.float32), 0.0)
    tl.store(
        shares + tl.program_id(0).to(tl.int64) * labels + label,
        tl.sum(scores, 0),
        mask=label < labels,
    )


@triton.jit
def pool(
    shares, lengths, first_row, row_count, slots, fresh, evidence, weight, row_evidence, logits,
    blocks, labels, prior, BLOCKS: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """Add a document's rows to its sums, evidence (S, labels) and weight (S,) float64, in place.

    row_evidence (R, labels) float32 is each row's, logits (D, labels) float64 the document's mean.
    """
    document = tl.program_id(0)
    count = tl.load(row_count + document)
    if count > 0:
        slot = tl.load(slots + document).to(tl.int64)
        old = tl.load(fresh + document) == 0
        label = tl.arange(0, LABELS)
        inside = label < labels
        block = tl.arange(0, BLOCKS)
        total = tl.load(evidence + slot * labels + label, mask=inside & old, other=0.0)
        tokens = tl.load(weight + slot, mask=old, other=0.0)
        first = tl.load(first_row + document)
        for row in range(first, first + count):
            at = (row * blocks + block).to(tl.int64)[:, None] * labels + label[None, :]
            there = (block < blocks)[:, None] & inside[None, :]
            share = tl.sum(tl.load(shares + at, mask=there, other=0.0), 0)
            tl.store(row_evidence + row * labels + label, share, mask=inside)
            total += share.to(tl.float64)
            tokens += tl.load(lengths + row).to(tl.float64)
        tl.store(evidence + slot * labels + label, total, mask=inside)
        tl.store(weight + slot, tokens)
        tl.store(logits + document * labels + label, total / (tokens + prior), mask=inside)
