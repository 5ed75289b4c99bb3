"""Triton kernels of the operation forward: responsibilities live in registers.

Source: arXiv:2606.18283. `gma.model.ops.triton.launch` launches them.

A row is cut into segments. Three kernels: each segment's sums, and the keys' responsibilities; each
document's exclusive prefix of the sums (`gma.model.ops.triton.scans`), which starts at its incoming
state and ends at its new one; each segment's outputs, block by block, from the prefix before it.
Keys are scored once: to keep their responsibilities costs less than to compute them again.
Documents meet in no sum, so that what is not finite in one stays there.

Shapes: R rows of C tokens, D documents, H heads, r routing_dim, K components, v value_dim, G
segments. r, K and v are powers of two from 16 to 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gma.model.ops.triton.device import (
    INTERPRETED,
    backwards,
    dot,
    head_mixture,
    load,
    locate,
    one_each,
    posterior,
    split_dot,
    store,
)


@triton.jit
def _sum_block(
    keys, values, grown, left, gammas, masses, memory, mass, kept, there, linear, quadratic, bias,
    NORMALIZE: tl.constexpr, EPSILON: tl.constexpr, KEEP: tl.constexpr, FORGET: tl.constexpr,
    ALL: tl.constexpr,
):  # fmt: skip
    """Return memory (v, K) and mass (K,) after a block, of which ALL tokens are there or some, and
    what it keeps of `kept`."""
    x = load(keys, there, ALL)
    val = load(values, there, ALL)
    weights, total = posterior(x, linear, quadratic, bias, NORMALIZE, EPSILON)
    inverse = 1.0 / total
    if not ALL:
        inverse = tl.where(there, inverse, 0.0)
    if FORGET:
        inverse *= one_each(grown, there, ALL)
    gamma = (weights * inverse[:, None]).to(val.dtype)
    if KEEP:
        store(gammas, gamma, there, ALL)
        tl.store(masses, mass)
    memory = dot(tl.trans(val), gamma, memory)
    # The mass of what was rounded, so that memory / mass is a mean of the values.
    mass += tl.sum(gamma.to(tl.float32), 0)
    if FORGET:
        share = tl.load(left)
        memory *= share
        mass *= share
        kept *= share
    return memory, mass, kept


@triton.jit
def sum_segments(
    k, val, grown, left, linear, quadratic, bias, lengths, sums, decays, gammas, masses,
    k_row, k_token, k_head, v_row, v_token, v_head, C, segments,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, EPSILON: tl.constexpr, STAGES: tl.constexpr, KEEP: tl.constexpr,
    FORGET: tl.constexpr,
):  # fmt: skip
    """Sum what each segment writes: sums (G, H, v + 1, K), the last row the mass.

    With KEEP also what `read_segments` goes on from: the keys' responsibilities, gammas (R, H, C,
    K) in val's dtype, and the segment's mass before each block, masses (G, H, SEGMENT / BLOCK, K).
    With FORGET, grown and left are those of `units.convert`: sums are what is left at the segment's
    end, decays (G, H) what is left there of what the segment found, and gammas are in a block's own
    units.
    """
    place = backwards()
    head, row, first, here, _ = locate(place, lengths, segments, C, SEGMENT, H)
    token = tl.arange(0, BLOCK)
    component = tl.arange(0, K)
    value = tl.arange(0, V)
    A, B, b = head_mixture(linear, quadratic, bias, head, K, R)
    segment = place.to(tl.int64)
    k += row * k_row + first.to(tl.int64) * k_token + head * k_head
    k += token[:, None] * k_token + tl.arange(0, R)[None, :]
    val += row * v_row + first.to(tl.int64) * v_token + head * v_head
    val += token[:, None] * v_token + value[None, :]
    gammas += ((row * H + head) * C + first) * K + token[:, None] * K + component[None, :]
    masses += segment * (SEGMENT // BLOCK) * K + component
    if FORGET:
        grown += (row * H + head) * C + first + token
        left += (row * H + head) * tl.cdiv(C, BLOCK) + first // BLOCK
    memory = tl.zeros((V, K), tl.float32)
    mass = tl.zeros((K,), tl.float32)
    kept = 1.0
    for _block in tl.range(0, here // BLOCK, num_stages=STAGES):
        memory, mass, kept = _sum_block(
            k, val, grown, left, gammas, masses, memory, mass, kept, token, A, B, b,
            NORMALIZE, EPSILON, KEEP, FORGET, True,
        )  # fmt: skip
        k += BLOCK * k_token
        val += BLOCK * v_token
        if FORGET:
            grown += BLOCK
            left += 1
        gammas += BLOCK * K
        masses += K
    # Once or not at all. As an `if` it reads the wrong shared memory: ptxas 12.8 takes one
    # half of a matrix's descriptor for the other (r 32, K 16, v 64).
    for _tail in tl.range(0, tl.cdiv(here % BLOCK, BLOCK)):
        there = token < here % BLOCK
        memory, mass, kept = _sum_block(
            k, val, grown, left, gammas, masses, memory, mass, kept, there, A, B, b,
            NORMALIZE, EPSILON, KEEP, FORGET, False,
        )  # fmt: skip
    sums += segment * (V + 1) * K
    tl.store(sums + value[:, None] * K + component[None, :], memory)
    tl.store(sums + V * K + component, mass)
    if FORGET:
        tl.store(decays + segment, kept)


@triton.jit
def _recall(reading, memory):
    """reading (B, K) @ memory (v, K).T in float32."""
    if reading.dtype == tl.float16:
        # What a document wrote may be more than a float16 holds.
        read = split_dot(reading.to(tl.float32), tl.trans(memory))
    else:
        read = dot(reading, tl.trans(memory.to(reading.dtype)))
    return read


@triton.jit
def _opening(gate):
    """The sigmoid of a gate, in float32; of bfloat16s to 2^-11, two at once by one tanh."""
    if INTERPRETED or gate.dtype != tl.bfloat16:
        opening = tl.sigmoid(gate.to(tl.float32))
    else:
        narrow = tl.inline_asm_elementwise(
            """{
                .reg .b32 x, y, half;
                shl.b32 x, $1, 16;
                and.b32 y, $1, 0xffff0000;
                mul.f32 x, x, 0f3f000000;
                mul.f32 y, y, 0f3f000000;
                cvt.rn.f16x2.f32 x, y, x;
                mov.b32 half, 0x38003800;
                tanh.approx.f16x2 x, x;
                fma.rn.f16x2 $0, x, half, half;
                }""",
            "=r,r",
            [gate],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
        opening = narrow.to(tl.float32)
    return opening


@triton.jit
def _put(out, rows, there, ALL: tl.constexpr):
    """Store rows (B, v); where out is of int16s, (B, v / 2), as pairs of float8s.

    Bytes would cross from one layout of registers to another one by one.
    """
    if out.dtype.element_ty == tl.int16:
        even, odd = tl.split(tl.reshape(rows, (rows.shape[0], rows.shape[1] // 2, 2)))
        pairs = tl.inline_asm_elementwise(
            "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,f,f", [even, odd], dtype=tl.int16,
            is_pure=True, pack=1,
        )  # fmt: skip
        store(out, pairs, there, ALL)
    else:
        store(out, rows.to(out.dtype.element_ty), there, ALL)


@triton.jit
def _read_block(
    queries, gammas, values, grown, left, open_gates, masses, out, memory, mass, there,
    inside, linear, quadratic, bias, epsilon, scale, NORMALIZE: tl.constexpr, EPSILON: tl.constexpr,
    FORGET: tl.constexpr, OPEN: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Write a block's outputs and return memory (v, K) after it, and what it keeps of mass (K,),
    that which was there before the segment.

    ALL its tokens are there or some, and `inside` says which are in the row.
    """
    x = load(queries, there, ALL)
    val = load(values, there, ALL)
    gamma = load(gammas, there, ALL)
    found = mass + tl.load(masses)
    reading, total = posterior(x, linear, quadratic, bias, NORMALIZE, EPSILON)
    rounded = reading.to(val.dtype)
    token = tl.arange(0, x.shape[0])
    affinity = dot(rounded, tl.trans(gamma))
    affinity = tl.where(token[:, None] >= token[None, :], affinity, 0.0)
    # Not divided by their sum: it cancels but for epsilon.
    weight = tl.sum(affinity, 1) + tl.sum(rounded.to(tl.float32) * found[None, :], 1)
    if FORGET:
        total *= one_each(grown, there, ALL)
    weight += epsilon * total
    read = _recall(rounded, memory)
    read = dot(affinity.to(val.dtype), val, read)
    inverse = scale / weight
    if not ALL:
        inverse = tl.where(there, inverse, 0.0)
    read *= inverse[:, None]
    if OPEN:
        read *= _opening(load(open_gates, there, ALL))
    _put(out, read, inside, ALL)
    memory = dot(tl.trans(val), gamma, memory)
    if FORGET:
        share = tl.load(left)
        memory *= share
        mass *= share
    return memory, mass


@triton.jit
def read_segments(
    q, gammas, masses, val, grown, left, open_gate, linear, quadratic, bias, lengths, before,
    out, q_row, q_token, q_head, v_row, v_token, v_head, o_row, o_token, o_head, C, segments,
    epsilon, scale,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, EPSILON: tl.constexpr, STAGES: tl.constexpr, FORGET: tl.constexpr,
    OPEN: tl.constexpr,
):  # fmt: skip
    """out (R, C, H, v), contiguous: each token's mean over what was written up to it.

    gammas and masses are those that `sum_segments` kept. With OPEN, the means are multiplied by the
    sigmoid of open_gate (R, C, H, v). All are multiplied by `scale`.
    """
    head, row, first, here, width = locate(tl.program_id(0), lengths, segments, C, SEGMENT, H)
    token = tl.arange(0, BLOCK)
    component = tl.arange(0, K)
    value = tl.arange(0, V)
    # Of elements, or of pairs of float8s, see `_put`.
    WIDE: tl.constexpr = V // 2 if not INTERPRETED and out.dtype.element_ty == tl.float8e4nv else V
    if WIDE < V:
        out = out.to(tl.pointer_type(tl.int16), bitcast=True)
    out += ((row * C + first) * H + head) * WIDE
    out_at = token[:, None] * (H * WIDE) + tl.arange(0, WIDE)[None, :]
    if here > 0:
        A, B, b = head_mixture(linear, quadratic, bias, head, K, R)
        segment = tl.program_id(0).to(tl.int64)
        queries = q + row * q_row + first.to(tl.int64) * q_token + head * q_head
        queries += token[:, None] * q_token + tl.arange(0, R)[None, :]
        values = val + row * v_row + first.to(tl.int64) * v_token + head * v_head
        values += token[:, None] * v_token + value[None, :]
        gamma = gammas + ((row * H + head) * C + first) * K
        gamma += token[:, None] * K + component[None, :]
        inner = masses + segment * (SEGMENT // BLOCK) * K + component
        grows, lefts, open_gates = grown, left, open_gate
        if OPEN:
            open_gates += row * o_row + first.to(tl.int64) * o_token + head * o_head
            open_gates += token[:, None] * o_token + value[None, :]
        if FORGET:
            grows += (row * H + head) * C + first + token
            lefts += (row * H + head) * tl.cdiv(C, BLOCK) + first // BLOCK
        before += segment * (V + 1) * K
        memory = tl.load(before + value[:, None] * K + component[None, :])
        mass = tl.load(before + V * K + component)
        for _block in tl.range(0, here // BLOCK, num_stages=STAGES):
            memory, mass = _read_block(
                queries, gamma, values, grows, lefts, open_gates, inner, out + out_at, memory, mass,
                token, token, A, B, b, epsilon, scale, NORMALIZE, EPSILON, FORGET, OPEN, True,
            )  # fmt: skip
            queries += BLOCK * q_token
            values += BLOCK * v_token
            gamma += BLOCK * K
            inner += K
            out += BLOCK * H * WIDE
            if OPEN:
                open_gates += BLOCK * o_token
            if FORGET:
                grows += BLOCK
                lefts += 1
        if here % BLOCK > 0:
            there = token < here % BLOCK
            inside = token < width - here // BLOCK * BLOCK
            _read_block(
                queries, gamma, values, grows, lefts, open_gates, inner, out + out_at, memory, mass,
                there, inside, A, B, b, epsilon, scale, NORMALIZE, EPSILON, FORGET, OPEN,
                False,
            )  # fmt: skip
            out += BLOCK * H * WIDE
    # Whoever multiplies by zero later what stands where no token is must not find NaN there.
    nothing = tl.zeros((BLOCK, WIDE), out.dtype.element_ty)
    for start in range(tl.cdiv(here, BLOCK) * BLOCK, width, BLOCK):
        tl.store(out + out_at, nothing, mask=(start + token < width)[:, None])
        out += BLOCK * H * WIDE


@triton.jit
def read_states(
    q, linear, quadratic, bias, lengths, document, states, out,
    q_row, q_token, q_head, C, segments, epsilon,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, EPSILON: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out (R, C, H, v), contiguous: each token's mean over its document's (D, H, v + 1, K)."""
    head, row, first, here, width = locate(tl.program_id(0), lengths, segments, C, SEGMENT, H)
    token = tl.arange(0, BLOCK)
    component = tl.arange(0, K)
    value = tl.arange(0, V)
    out += ((row * C + first) * H + head) * V
    out_at = token[:, None] * (H * V) + value[None, :]
    if here > 0:
        A, B, b = head_mixture(linear, quadratic, bias, head, K, R)
        q += row * q_row + first.to(tl.int64) * q_token + head * q_head
        q_at = token[:, None] * q_token + tl.arange(0, R)[None, :]
        states += (tl.load(document + row).to(tl.int64) * H + head) * (V + 1) * K
        memory = tl.load(states + value[:, None] * K + component[None, :])
        mass = tl.load(states + V * K + component)
        for start in tl.range(0, here, BLOCK, num_stages=STAGES):
            there = start + token < here
            queries = tl.load(q + q_at, mask=there[:, None], other=0.0)
            reading, total = posterior(queries, A, B, b, NORMALIZE, EPSILON)
            rounded = reading.to(queries.dtype)
            weight = tl.sum(rounded.to(tl.float32) * mass[None, :], 1) + epsilon * total
            read = _recall(rounded, memory)
            read = tl.where(there, 1.0 / weight, 0.0)[:, None] * read
            inside = start + token < width
            tl.store(out + out_at, read.to(out.dtype.element_ty), mask=inside[:, None])
            q += BLOCK * q_token
            out += BLOCK * H * V
    nothing = tl.zeros((BLOCK, V), out.dtype.element_ty)
    for start in range(tl.cdiv(here, BLOCK) * BLOCK, width, BLOCK):
        tl.store(out + out_at, nothing, mask=(start + token < width)[:, None])
        out += BLOCK * H * V
