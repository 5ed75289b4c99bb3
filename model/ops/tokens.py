"""What a step does token by token beside its products and mixers: one pass over memory each.

Shapes: R rows of C tokens, N = R * C, D documents, S slots, L layers, W width, T tail. Documents
and rows are those of a step: a document's rows stand together, all but its last full.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def embed(tokens, table, x, width, count, WIDTH: tl.constexpr, TOKENS: tl.constexpr):
    """x (N, W) from ids (N,) and table (V, W)."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    here = tl.arange(0, WIDTH)
    there = (token < count)[:, None] & (here < width)[None, :]
    id_ = tl.load(tokens + token, mask=token < count, other=0).to(tl.int64)
    rows = tl.load(table + id_[:, None] * width + here[None, :], mask=there)
    tl.store(x + token[:, None] * width + here[None, :], rows, mask=there)


@triton.jit
def normalize(
    x, inverse, normal, width, epsilon, count,
    PARTS: tl.constexpr, PART: tl.constexpr, TOKENS: tl.constexpr, NORMAL: tl.constexpr,
):  # fmt: skip
    """inverse (N,) is one over the root mean squares of the rows of x (N, W).

    With NORMAL, normal (N, W) is x times that, instead.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    at, inside = _tile(token, token < count, width, PARTS, PART)
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    root = _inverse_root(row, width, epsilon)
    if NORMAL:
        tl.store(normal + at, (row * root[None, :, None]).to(normal.dtype.element_ty), mask=inside)
    else:
        tl.store(inverse + token, root, mask=token < count)


@triton.jit
def _tile(token, there, width, PARTS: tl.constexpr, PART: tl.constexpr):
    """Offsets and mask of rows of W, (PARTS, tokens, PART).

    A part is a warp's width, so that a row lies in one warp and its sums need no barrier.
    """
    here = tl.arange(0, PARTS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
    return token[None, :, None] * width + here, there[None, :, None] & (here < width)


@triton.jit
def _inverse_root(row, width, epsilon):
    """(PARTS, tokens, PART) -> (tokens,), one over the rows' root mean squares."""
    # Parts first: they lie in one thread.
    return tl.rsqrt(tl.sum(tl.sum(row * row, 0), 1) / width + epsilon)


@triton.jit
def convolve(
    x, tail, taps, tail_taps, lengths, document, first_row, slots, fresh, y, inverse, normal,
    C, width, epsilon, tail_slot, T: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    TOKENS: tl.constexpr, NORMAL: tl.constexpr,
):  # fmt: skip
    """y (N, W) is x plus the short convolution of x's normalised rows, and `inverse` (N,) one over
    y's rows' root mean squares; with NORMAL, normal (N, W) is y normalised, instead.

    What comes before a row is its document's row before, or its document's tail, of which tail
    (S, ., T, W) has the layer's. taps (T + 1, W), the last the token's own, are for normalised rows
    of x, and have their weights in them; tail_taps (T + 1, W) are for tails, which have them.
    """
    blocks = tl.cdiv(C, TOKENS)
    row = tl.program_id(0) // blocks
    token = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    base = row.to(tl.int64) * C
    belongs = tl.load(document + row)
    used = tl.load(lengths + row) > 0
    continues = used & (tl.load(first_row + belongs) < row)
    # As many rows as there are tokens: Triton would lay out one row otherwise than many.
    weight_at, weight_in = _tile(tl.zeros_like(token), token >= 0, width, PARTS, PART)
    here, there = _tile(base + token, token < C, width, PARTS, PART)
    own = tl.load(x + here, mask=there, other=0.0).to(tl.float32)
    weight = tl.load(taps + T * width + weight_at, mask=weight_in, other=0.0).to(tl.float32)
    total = own + own * _inverse_root(own, width, epsilon)[None, :, None] * weight
    for tap in tl.static_range(T):
        reachable = (token < C) & ((token >= T - tap) | continues)
        at, inside = _tile(base + token - (T - tap), reachable, width, PARTS, PART)
        seen = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(taps + tap * width + weight_at, mask=weight_in, other=0.0).to(tl.float32)
        total += seen * _inverse_root(seen, width, epsilon)[None, :, None] * weight
    if T > 0:
        begins = tl.program_id(0) % blocks * TOKENS < T
        if begins & used & (not continues):
            old = tl.load(fresh + belongs) == 0
            tail += tl.load(slots + belongs).to(tl.int64) * tail_slot
            for tap in tl.static_range(T):
                remembered = old & (token < C) & (token < T - tap)
                at, inside = _tile((token + tap).to(tl.int64), remembered, width, PARTS, PART)
                weight = tl.load(tail_taps + tap * width + weight_at, mask=weight_in, other=0.0)
                total += tl.load(tail + at, mask=inside, other=0.0) * weight
    stored = total.to(y.dtype.element_ty)
    tl.store(y + here, stored, mask=there)
    wide = stored.to(tl.float32)
    root = _inverse_root(wide, width, epsilon)
    if NORMAL:
        narrow = (wide * root[None, :, None]).to(normal.dtype.element_ty)
        tl.store(normal + here, narrow, mask=there)
    else:
        tl.store(inverse + base + token, root, mask=token < C)


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
    """What each block of a row says: shares (R, blocks, labels), sums of its tokens' scores.

    deep (N, deep_stride): a reading for each label, then the gate's. table (V, labels) has the
    tokens' own scores.
    """
    blocks = tl.cdiv(C, TOKENS)
    row = tl.program_id(0) // blocks
    token = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    there = token < tl.load(lengths + row)
    label = tl.arange(0, LABELS)
    known = label < labels
    inside = there[:, None] & known[None, :]
    at = row.to(tl.int64) * C + token
    id_ = tl.load(tokens + at, mask=there, other=0).to(tl.int64)
    reading = tl.load(deep + at[:, None] * deep_stride + label[None, :], mask=inside, other=0.0)
    reading += tl.load(bias + label, mask=known, other=0.0)[None, :]
    gate = tl.load(deep + at * deep_stride + labels, mask=there, other=0.0)
    gate += tl.load(bias + labels)
    # softplus, which is the identity where exp would overflow
    open_ = tl.where(gate > 20.0, gate, tl.log(1.0 + tl.exp(tl.minimum(gate, 20.0))))
    own = tl.load(table + id_[:, None] * labels + label[None, :], mask=inside, other=0.0)
    total = tl.sum(tl.where(inside, reading * open_[:, None] + own, 0.0), 0)
    tl.store(shares + tl.program_id(0).to(tl.int64) * labels + label, total, mask=known)


@triton.jit
def add_shares(shares, evidence, blocks, labels, BLOCKS: tl.constexpr, LABELS: tl.constexpr):
    """A row's evidence (R, labels) is the sum of its shares (R, blocks, labels)."""
    row = tl.program_id(0)
    label = tl.arange(0, LABELS)
    block = tl.arange(0, BLOCKS)
    at = (row * blocks + block).to(tl.int64)[:, None] * labels + label[None, :]
    there = (block < blocks)[:, None] & (label < labels)[None, :]
    total = tl.sum(tl.load(shares + at, mask=there, other=0.0), 0)
    tl.store(evidence + row * labels + label, total, mask=label < labels)


@triton.jit
def pool(
    row_evidence, lengths, first_row, row_count, slots, fresh, evidence, weight, logits, labels,
    prior, ROWS: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """Add a document's rows to its sums, evidence (S, labels) and weight (S,) float64, in place.

    row_evidence (R, labels) is each row's, logits (D, labels) float64 become the document's mean.
    """
    document = tl.program_id(0)
    count = tl.load(row_count + document)
    if count > 0:
        slot = tl.load(slots + document).to(tl.int64)
        old = tl.load(fresh + document) == 0
        label = tl.arange(0, LABELS)
        known = label < labels
        total = tl.load(evidence + slot * labels + label, mask=known & old, other=0.0)
        tokens = tl.load(weight + slot, mask=old, other=0.0)
        first = tl.load(first_row + document)
        for start in tl.range(0, count, ROWS):
            row = start + tl.arange(0, ROWS)
            at = (first + row)[:, None] * labels + label[None, :]
            there = (row < count)[:, None] & known[None, :]
            of_row = tl.load(row_evidence + at, mask=there, other=0.0)
            total += tl.sum(of_row.to(tl.float64), 0)
            length = tl.load(lengths + first + row, mask=row < count, other=0)
            tokens += tl.sum(length, 0).to(tl.float64)
        tl.store(evidence + slot * labels + label, total, mask=known)
        tl.store(weight + slot, tokens)
        tl.store(logits + document * labels + label, total / (tokens + prior), mask=known)
