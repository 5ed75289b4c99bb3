"""What a step does token by token beside its products and mixers: one pass over memory each.

Shapes: R rows of C tokens, N = R * C, D documents, S slots, L layers, W width, T tail. Documents
and rows are those of a step: a document's rows stand together, all but its last full. WIDTH is the
power of two from W; KNOWN is W where it is known when a kernel is compiled, which leaves out what
is beyond it, else 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gma.model.ops.triton.device import INTERPRETED, backwards, dot
from gma.model.ops.triton.units import store_units

REGISTERS = 200
"""How many a thread of a convolution may have."""

STRIP = 8
"""Tokens that a program takes one after the other."""


def warps(width: int, size: int = 2) -> int:
    """Return how many warps take a row of `width` entries of `size` bytes."""
    return max(1, width * size // 2048)


@triton.jit
def embed(tokens, table, x, width, count, WIDTH: tl.constexpr, TOKENS: tl.constexpr):
    """x (N, W) from ids (N,) and table (V, W)."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    here = tl.max_contiguous(tl.arange(0, WIDTH), 8)
    there = (token < count)[:, None] & (here < width)[None, :]
    id_ = tl.load(tokens + token, mask=token < count, other=0).to(tl.int64)
    rows = tl.load(table + id_[:, None] * width + here[None, :], mask=there)
    tl.store(x + token[:, None] * width + here[None, :], rows, mask=there)


@triton.jit
def _store_units(
    rate, there, grown, left, row, block, C, most,
    H: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store what `units.convert` does, of what is projected for a block's rates (B, HEADS)."""
    # softplus, but for rates that are cut anyway; log(1 + y) as a series, exact where y is tiny
    y = tl.exp(tl.minimum(rate, -1.25))
    s = y / (2.0 + y)
    t = s * s
    rate = 2.0 * s * (1.0 + t * (1.0 / 3 + t * (1.0 / 5 + t * (1.0 / 7 + t * (1.0 / 9)))))
    rate = tl.where(there, tl.minimum(rate, most), 0.0)
    store_units(rate, grown, left, row, block, C, H, HEADS, BLOCK)


@triton.jit
def forget(
    projected, keep_bias, lengths, grown, left, C, width, most,
    AT: tl.constexpr, H: tl.constexpr, LASTING: tl.constexpr, HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What `units.convert` stores, of what is projected (N, width) from entry AT of a token's on.

    There it has the rates of the heads that forget, all but the first LASTING. most: the largest
    rate. HEADS: the power of two from H.
    """
    blocks = tl.cdiv(C, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    token = block * BLOCK + tl.arange(0, BLOCK)
    head = tl.arange(0, HEADS)
    forgets = (head >= LASTING) & (head < H)
    there = (token < tl.load(lengths + row))[:, None] & forgets[None, :]
    own = projected + (row * C + token)[:, None] * width + AT + head[None, :] - LASTING
    rate = tl.load(own, mask=there, other=0.0).to(tl.float32)
    rate += tl.load(keep_bias + head - LASTING, mask=forgets, other=0.0)[None, :]
    _store_units(rate, there, grown, left, row, block, C, most, H, HEADS, BLOCK)


@triton.jit
def project_rates(
    x, factor, keep, keep_bias, lengths, grown, left, C, width, most,
    H: tl.constexpr, LASTING: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    DEPTH: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Store the same as `forget`, of x (N, width), which is projected by keep (HEADS, width).

    In a product with what else is projected, a few rates would take another tile of outputs. With
    FACTOR, rows of x are multiplied by factor (N,). keep_bias (HEADS,). HEADS: the power of two
    from H, and at least 16.
    """
    blocks = tl.cdiv(C, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    token = block * BLOCK + tl.arange(0, BLOCK)
    head = tl.arange(0, HEADS)
    here = token < tl.load(lengths + row)
    there = here[:, None] & ((head >= LASTING) & (head < H))[None, :]
    inner = tl.max_contiguous(tl.arange(0, DEPTH), 16)
    x += (row * C + token)[:, None] * width + inner[None, :]
    keep += head[:, None] * width + inner[None, :]
    rate = tl.zeros((BLOCK, HEADS), tl.float32)
    for start in tl.range(0, width, DEPTH):
        inside = (start + inner < width)[None, :]
        of_tokens = tl.load(x + start, mask=here[:, None] & inside, other=0.0)
        of_heads = tl.load(keep + start, mask=inside, other=0.0)
        rate = dot(of_tokens.to(of_heads.dtype), tl.trans(of_heads), rate)
    if FACTOR:
        rate *= tl.load(factor + row * C + token, mask=here, other=0.0)[:, None]
    rate += tl.load(keep_bias + head)[None, :]
    _store_units(rate, there, grown, left, row, block, C, most, H, HEADS, BLOCK)


@triton.jit
def _widen(x):
    """A row as float32: bfloat16s two at once, each by one instruction."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        wide = x.to(tl.float32)
    else:
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32,
            is_pure=False, pack=2,
        )  # fmt: skip
    return wide


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """A float32 row as dtype: bfloat16s two an instruction, for one alone takes as long as 8."""
    if INTERPRETED or dtype != tl.bfloat16:
        narrow = x.to(dtype)
    else:
        narrow = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return narrow


@triton.jit
def _inverse_root(row, width, epsilon):
    """One over the root mean square of a row (WIDTH,)."""
    return tl.rsqrt(tl.sum(row * row, 0) / width + epsilon)


@triton.jit
def normalize(
    x, inverse, normal, width, epsilon, count,
    KNOWN: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr, NORMAL: tl.constexpr,
):  # fmt: skip
    """inverse (N,) is one over the root mean squares of the rows of x (N, W).

    With NORMAL, normal (N, W) is x times that, instead. STRIP rows are taken one after the other.
    """
    if KNOWN:
        width = KNOWN
    first = backwards().to(tl.int64) * STRIP
    here = tl.max_contiguous(tl.arange(0, WIDTH), 8)
    inside = here < width
    upcoming = tl.load(x + first * width + here, mask=inside & (first < count), other=0.0)
    for step in tl.static_range(STRIP):
        at = first + step
        row = tl.where(inside, _widen(upcoming), 0.0)
        # Asked for before this row is stored, so that it comes meanwhile.
        more = inside & (at + 1 < count) & (step + 1 < STRIP)
        upcoming = tl.load(x + (at + 1) * width + here, mask=more, other=0.0)
        root = _inverse_root(row, width, epsilon)
        if NORMAL:
            narrow = (row * root).to(normal.dtype.element_ty)
            tl.store(normal + at * width + here, narrow, mask=inside & (at < count))
        else:
            tl.store(inverse + at, root, mask=at < count)


@triton.jit
def _normalized(x, at, mask, width, epsilon, here):
    """A row, normalised."""
    row = _widen(tl.load(x + at * width + here, mask=mask, other=0.0))
    return row * _inverse_root(row, width, epsilon)


@triton.jit
def _scaled(x, at, norm, mask, width, epsilon, here):
    """A row as tails have it: normalised, and with the weights of its norm."""
    scale = tl.load(norm + here, mask=mask, other=0.0)
    return _normalized(x, at, mask, width, epsilon, here) * scale


@triton.jit
def remember(
    x, tail, tail_after, before, norm, lengths, document, row_count, first_row, slots, fresh,
    rows, documents, C, width, epsilon, tail_slot,
    T: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """What a convolution finds before each row, before (R, T, W) float32: its document's tail, or
    the last inputs of the row before; and each document's tail after the step.

    Tails are the last T inputs, at most 3: normalised, and times norm (W,). Of tail (S, ., T, W)
    and tail_after, which may be the same, a document has that in its slot with SLOTS, which stays
    as it is if the document has no rows; else that of its own place, to which its tail goes then. A
    program takes the row and the document of its place; only the document's touches its slot.
    """
    place = tl.program_id(0)
    here = tl.max_contiguous(tl.arange(0, WIDTH), 8)
    inside = here < width
    if place < rows:
        used = tl.load(lengths + place) > 0
        belongs = tl.load(document + place)
        first = tl.load(first_row + belongs, mask=used, other=-1)
        if first != place:
            # In the document as far as this step has it: rows before this are full.
            position = (place - first) * C - T
            start = place.to(tl.int64) * C - T
            slot = belongs.to(tl.int64)
            if SLOTS:
                slot = tl.load(slots + belongs, mask=used, other=0).to(tl.int64)
            old = used & (tl.load(fresh + belongs, mask=used, other=1) == 0)
            for depth in tl.static_range(3):
                there = inside & (depth < T)
                reached = there & old & (position + depth < 0)
                at_tail = slot * tail_slot + (position + depth + T) * width
                own = tl.load(tail + at_tail + here, mask=reached, other=0.0)
                of_rows = there & used & (position + depth >= 0)
                own += _scaled(x, start + depth, norm, of_rows, width, epsilon, here)
                tl.store(before + (place * T + depth) * width + here, own, mask=there)
    if place < documents:
        count = tl.load(row_count + place)
        if (count > 0) | (not SLOTS):
            first = tl.load(first_row + place)
            row = first + tl.maximum(count, 1) - 1
            length = tl.load(lengths + row, mask=count > 0, other=0)
            position = (row - first) * C + length - T
            start = first.to(tl.int64) * C + position
            slot = place.to(tl.int64)
            if SLOTS:
                slot = tl.load(slots + place).to(tl.int64)
            of_document = tail + slot * tail_slot + here
            old = tl.load(fresh + place) == 0
            found, kept = (), ()
            for depth in tl.static_range(3):
                there = inside & (depth < T)
                own = tl.load(of_document + depth * width, mask=there & old, other=0.0)
                found += (own,)  # type: ignore[assignment]
                reached = there & old & (position + depth < 0)
                at_tail = (position + depth + T) * width
                own = tl.load(of_document + at_tail, mask=reached, other=0.0)
                of_rows = there & (position + depth >= 0)
                own += _scaled(x, start + depth, norm, of_rows, width, epsilon, here)
                kept += (own,)  # type: ignore[assignment]
            # All of the old tail is read before any of the new one is written.
            tl.debug_barrier()
            for depth in tl.static_range(3):
                there = inside & (depth < T)
                at = (first * T + depth) * width + here
                tl.store(before + at, found[depth], mask=there & (count > 0))
                after = tail_after + slot * tail_slot + depth * width + here
                tl.store(after, kept[depth], mask=there)


@triton.jit
def convolve(
    x, before, taps, tail_taps, y, inverse, normal, C, width, epsilon,
    T: tl.constexpr, KNOWN: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr,
    NORMAL: tl.constexpr,
):  # fmt: skip
    """y (N, W) is x plus the short convolution of x's normalised rows, and `inverse` (N,) one over
    y's rows' root mean squares; with NORMAL, normal (N, W) is y normalised, instead.

    What comes before a row is in before (R, T, W), see `remember`, whether the step has it or the
    document's tail: a row's numbers do not depend on where its step begins. taps (4, W), the last
    the token's own, are for the row's own tokens, normalised, and have the norm's weights in them;
    tail_taps (4, W) are for `before`, which has them. T is at most 3, and the taps before are zero.
    A program takes STRIP tokens, one after the other, so that a row is read from memory once.
    """
    if KNOWN:
        width = KNOWN
    strips = tl.cdiv(C, STRIP)
    row = (backwards() // strips).to(tl.int64)
    first = backwards() % strips * STRIP
    start = row * C + first
    here = tl.max_contiguous(tl.arange(0, WIDTH), 8)
    inside = here < width
    earlier = tl.minimum(first, T)
    third = _normalized(x, start - 3, inside & (earlier > 2), width, epsilon, here)
    second = _normalized(x, start - 2, inside & (earlier > 1), width, epsilon, here)
    last = _normalized(x, start - 1, inside & (earlier > 0), width, epsilon, here)
    upcoming = tl.load(x + start * width + here, mask=inside & (first < C), other=0.0)
    # Kept, for a load that hits the cache waits for those before it that do not.
    first_tap = tl.load(taps + here, mask=inside, other=0.0)
    second_tap = tl.load(taps + width + here, mask=inside, other=0.0)
    third_tap = tl.load(taps + 2 * width + here, mask=inside, other=0.0)
    own_tap = tl.load(taps + 3 * width + here, mask=inside, other=0.0)
    for step in tl.static_range(STRIP):
        token = first + step
        at = start + step
        there = inside & (token < C)
        total = tl.where(inside, _widen(upcoming), 0.0)
        # Asked for before this token's row is stored, so that it comes meanwhile.
        more = inside & (token + 1 < C) & (step + 1 < STRIP)
        upcoming = tl.load(x + (at + 1) * width + here, mask=more, other=0.0)
        own = total * _inverse_root(total, width, epsilon)
        total += own * _widen(own_tap)
        total += last * _widen(third_tap)
        total += second * _widen(second_tap)
        total += third * _widen(first_tap)
        if step < 3:  # noqa: SIM102 (known when compiled, the other is not)
            if first == 0:
                for place in tl.static_range(step, 3):
                    reached = there & (step + 3 - place <= T)
                    tap = tail_taps + (place - step) * width + here
                    weight = tl.load(tap, mask=reached, other=0.0)
                    found = before + (row * T + T - 3 + place) * width + here
                    total += tl.load(found, mask=reached, other=0.0) * weight
        third, second, last = second, last, own
        total = tl.where(inside, total, 0.0)
        tl.store(y + at * width + here, _narrow(total, y.dtype.element_ty), mask=there)
        root = _inverse_root(total, width, epsilon)
        if NORMAL:
            narrow = (total * root).to(normal.dtype.element_ty)
            tl.store(normal + at * width + here, narrow, mask=there)
        else:
            tl.store(inverse + at, root, mask=token < C)


@triton.jit
def _softplus(x):
    """Compute log(1 + exp(x)), which is x where exp would overflow, as exactly where it is small.

    Background rates of 1e-5 add up over a book, and 1 + 1e-5 has lost most of them.
    """
    small = tl.exp(tl.minimum(x, 20.0))
    series = small * (1.0 - small * (0.5 - small * (1.0 / 3.0 - small * 0.25)))
    return tl.where(x > 20.0, x, tl.where(small < 0.06, series, tl.log(1.0 + small)))


@triton.jit
def score(
    deep, bias, tokens, table, factor, lengths, shares, C, labels, deep_stride,
    LABELS: tl.constexpr, TOKENS: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """What each block of a row says: shares (R, blocks, labels), sums of its tokens' scores.

    deep (N, deep_stride): a reading for each label, then the gate's. table (V, labels) has the
    tokens' own scores. With ANY scores are rates, there is no gate, and factor (labels,) is the
    labels'.
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
    own = tl.load(table + id_[:, None] * labels + label[None, :], mask=inside, other=0.0)
    if ANY:
        scores = _softplus(reading + own)
        scores *= tl.load(factor + label, mask=known, other=0.0)[None, :]
    else:
        gate = tl.load(deep + at * deep_stride + labels, mask=there, other=0.0)
        gate += tl.load(bias + labels)
        scores = reading * _softplus(gate)[:, None] + own
    total = tl.sum(tl.where(inside, scores, 0.0), 0)
    tl.store(shares + tl.program_id(0).to(tl.int64) * labels + label, total, mask=known)


@triton.jit
def add_shares(shares, evidence, blocks, labels, BLOCKS: tl.constexpr, LABELS: tl.constexpr):
    """A row's evidence (R, labels) is the sum of its shares (R, blocks, labels)."""
    row = tl.program_id(0)
    label = tl.arange(0, LABELS)
    total = tl.zeros((LABELS,), tl.float32)
    for start in tl.range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        at = (row * blocks + block).to(tl.int64)[:, None] * labels + label[None, :]
        there = (block < blocks)[:, None] & (label < labels)[None, :]
        total += tl.sum(tl.load(shares + at, mask=there, other=0.0), 0)
    tl.store(evidence + row * labels + label, total, mask=label < labels)


@triton.jit
def _log_odds(x):
    """Compute log(exp(x) - 1) of x > 0 in float64, as x + log(1 - exp(-x))."""
    series = x * (1.0 - x * (0.5 - x * (1.0 / 6.0 - x * (1.0 / 24.0))))
    return x + tl.log(tl.where(x < 1e-3, series, 1.0 - tl.exp(-x)))


@triton.jit
def pool(
    row_evidence, lengths, first_row, row_count, slots, fresh, evidence, weight, logits, labels,
    prior, AHEAD: tl.constexpr, LABELS: tl.constexpr, LEAST: tl.constexpr, ANY: tl.constexpr,
):  # fmt: skip
    """Add a document's rows to its sums, evidence (S, labels) and weight (S,) float64, in place.

    row_evidence (R, labels) is each row's, logits (D, labels) float64 become the document's mean,
    or with ANY the log odds of its sums, of which less than LEAST counts as that.
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
        # One after the other: sums are the same whichever rows share a step.
        for row in tl.range(first, first + count, num_stages=AHEAD):
            total += tl.load(row_evidence + row * labels + label, mask=known, other=0.0)
            tokens += tl.load(lengths + row)
        tl.store(evidence + slot * labels + label, total, mask=known)
        tl.store(weight + slot, tokens)
        if ANY:
            answer = _log_odds(tl.where(total < LEAST, LEAST, total))
        else:
            answer = total / (tokens + prior)
        tl.store(logits + document * labels + label, answer, mask=known)
