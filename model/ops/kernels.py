"""Triton kernels of the operation forward: responsibilities live in registers.

Source: arXiv:2606.18283. `gma.model.ops.triton` launches them.

A row is cut into segments. Three kernels: each segment's sums, and the keys' responsibilities; each
document's exclusive prefix of the sums, which starts at its incoming state and ends at its new one;
each segment's outputs, block by block, from the prefix before it. Keys are scored once: to keep
their responsibilities costs less than to compute them again. Documents meet in no sum, so that what
is not finite in one stays there.

Squares and scores are exact to about 2^-16 with bfloat16 and float16 inputs: a bfloat16's square, a
float16, and nearly so a weight, is the sum of two bfloat16s. Sums and states are float32.

Shapes: R rows of C tokens, D documents, H heads, r routing_dim, K components, v value_dim, G
segments. r, K and v are powers of two from 16 to 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter multiplies the bits of bfloat16s.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, acc=None):
    """a @ b + acc in float32, of two of one dtype."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def _weights(linear, quadratic, bias, head, K: tl.constexpr, R: tl.constexpr):
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
def _split(x):
    """Two bfloat16s whose sum is x to 16 bits.

    The first is cut, not rounded: that takes no conversion, of which the device does few at a time.
    """
    high = (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def _split_dot(a, b):
    """a @ b of float32s, to 16 bits of each."""
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    both = _dot(a_high, b_high)
    both = _dot(a_low, b_high, both)
    return _dot(a_high, b_low, both)


@triton.jit
def _posterior(x, linear, quadratic, bias, NORMALIZE: tl.constexpr, EPSILON: tl.constexpr):
    """x (B, r) -> responsibilities (B, K) float32, not normalised, and their sums (B,)."""
    wide = x.to(tl.float32)
    square = wide * wide
    if x.dtype == tl.bfloat16:
        linear_high, linear_low = _split(linear)
        first = _dot(x, linear_high)
        first = _dot(x, linear_low, first)
        second = _split_dot(square, quadratic)
    elif x.dtype == tl.float16:
        first = _split_dot(wide, linear)
        second = _split_dot(square, quadratic)
    else:
        first = _dot(wide, linear)
        second = _dot(square, quadratic)
    if NORMALIZE:
        # One factor for both: it crosses from one layout of registers to another.
        root = tl.rsqrt(tl.sum(square, 1) / x.shape[1] + EPSILON)[:, None]
        scores = root * (first + second * root) + bias[None, :]
    else:
        scores = first + second + bias[None, :]
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights, tl.sum(weights, 1)


@triton.jit
def _recall(reading, memory):
    """reading (B, K) @ memory (v, K).T in float32."""
    if reading.dtype == tl.float16:
        # What a document wrote may be more than a float16 holds.
        read = _split_dot(reading.to(tl.float32), tl.trans(memory))
    else:
        read = _dot(reading, tl.trans(memory.to(reading.dtype)))
    return read


@triton.jit
def backwards():
    """The program's place, counted from the last.

    What goes through memory backwards finds in the cache what was written last before it.
    """
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def _place(place, lengths, segments, C, SEGMENT: tl.constexpr, H: tl.constexpr):
    """The head and row at a place, its first token, how many tokens are there, and in the row.

    Neighbouring places are one segment's heads, for those lie side by side in memory: what one
    reads brings the next one's half of a cache line along.
    """
    head = (place % H).to(tl.int64)
    row = place // H // segments
    first = place // H % segments * SEGMENT
    here = tl.minimum(tl.maximum(tl.load(lengths + row).to(tl.int32) - first, 0), SEGMENT)
    return head, row.to(tl.int64), first, here, tl.minimum(C - first, SEGMENT)


@triton.jit
def _load(at, there, ALL: tl.constexpr):
    """Tokens' rows, with zeros for those that are not there."""
    return tl.load(at) if ALL else tl.load(at, mask=there[:, None], other=0.0)


@triton.jit
def _store(at, rows, there, ALL: tl.constexpr):
    if ALL:
        tl.store(at, rows)
    else:
        tl.store(at, rows, mask=there[:, None])


@triton.jit
def _sum_block(
    keys, values, gammas, masses, memory, mass, there, linear, quadratic, bias,
    NORMALIZE: tl.constexpr, EPSILON: tl.constexpr, KEEP: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """memory (v, K) and mass (K,) after a block, of which ALL tokens are there or some."""
    x = _load(keys, there, ALL)
    val = _load(values, there, ALL)
    weights, total = _posterior(x, linear, quadratic, bias, NORMALIZE, EPSILON)
    inverse = 1.0 / total
    if not ALL:
        inverse = tl.where(there, inverse, 0.0)
    gamma = (weights * inverse[:, None]).to(val.dtype)
    if KEEP:
        _store(gammas, gamma, there, ALL)
        tl.store(masses, mass)
    # The mass of what was rounded, so that memory / mass is a mean of the values.
    return _dot(tl.trans(val), gamma, memory), mass + tl.sum(gamma.to(tl.float32), 0)


@triton.jit
def _sum_segments(
    k, val, linear, quadratic, bias, lengths, sums, gammas, masses,
    k_row, k_token, k_head, v_row, v_token, v_head, C, segments,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, EPSILON: tl.constexpr, STAGES: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """What each segment writes: sums (G, H, v + 1, K), the last row the mass.

    With KEEP also what `_read_segments` goes on from: the keys' responsibilities, gammas (R, H, C,
    K) in val's dtype, and the segment's mass before each block, masses (G, H, SEGMENT / BLOCK, K).
    """
    place = backwards()
    head, row, first, here, _ = _place(place, lengths, segments, C, SEGMENT, H)
    token = tl.arange(0, BLOCK)
    component = tl.arange(0, K)
    value = tl.arange(0, V)
    A, B, b = _weights(linear, quadratic, bias, head, K, R)
    segment = place.to(tl.int64)
    k += row * k_row + first.to(tl.int64) * k_token + head * k_head
    k += token[:, None] * k_token + tl.arange(0, R)[None, :]
    val += row * v_row + first.to(tl.int64) * v_token + head * v_head
    val += token[:, None] * v_token + value[None, :]
    gammas += ((row * H + head) * C + first) * K + token[:, None] * K + component[None, :]
    masses += segment * (SEGMENT // BLOCK) * K + component
    memory = tl.zeros((V, K), tl.float32)
    mass = tl.zeros((K,), tl.float32)
    for _block in tl.range(0, here // BLOCK, num_stages=STAGES):
        memory, mass = _sum_block(
            k, val, gammas, masses, memory, mass, token, A, B, b, NORMALIZE, EPSILON, KEEP, True
        )
        k += BLOCK * k_token
        val += BLOCK * v_token
        gammas += BLOCK * K
        masses += K
    # Once or not at all. As an `if` it reads the wrong shared memory: ptxas 12.8 takes one
    # half of a matrix's descriptor for the other (r 32, K 16, v 64).
    for _tail in tl.range(0, tl.cdiv(here % BLOCK, BLOCK)):
        there = token < here % BLOCK
        memory, mass = _sum_block(
            k, val, gammas, masses, memory, mass, there, A, B, b, NORMALIZE, EPSILON, KEEP, False
        )
    sums += segment * (V + 1) * K
    tl.store(sums + value[:, None] * K + component[None, :], memory)
    tl.store(sums + V * K + component, mass)


@triton.jit
def _prefix(
    sums, memory, mass, memory_after, mass_after, first_row, row_count, slots, fresh, documents,
    memory_document, memory_head, memory_component, mass_document, mass_head,
    after_document, after_head, after_component, mass_after_document, mass_after_head, segments,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    FRESH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Each document's incoming state plus its earlier segments, in the place of their sums.

    With FRESH, what is in the state of a document that is fresh means nothing. With SLOTS, a
    document's state lies in its slot of memory and mass, and stays as it is if it has no rows.
    """
    head = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    of_memory = at < V * K
    of_mass = (at >= V * K) & (at < (V + 1) * K)
    here = at < (V + 1) * K
    depth = tl.arange(0, DEPTH)
    size: tl.constexpr = (V + 1) * K
    offsets = depth[:, None] * (H * size) + at[None, :]
    in_memory = head * memory_head + at % K * memory_component + at // K
    in_mass = head * mass_head + at - V * K
    in_after = head * after_head + at % K * after_component + at // K
    in_mass_after = head * mass_after_head + at - V * K
    # Documents of few segments, a program each; a state's own layout and that of its sums differ,
    # so that only whole ones are read and written in long pieces.
    few: tl.constexpr = DEPTH // 4
    component, value = tl.arange(0, K), tl.arange(0, V)
    of_state = component[:, None] * memory_component + value[None, :]
    of_after = component[:, None] * after_component + value[None, :]
    of_sums = value[None, :] * K + component[:, None]
    programs = tl.num_programs(0) * tl.num_programs(2)
    own_place = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    for document in range(own_place, documents, programs):
        count = tl.load(row_count + document).to(tl.int32) * segments
        if (count <= few) & ((count > 0) | (not SLOTS)):
            slot = tl.zeros((), tl.int64) + document
            if SLOTS:
                slot = tl.load(slots + document).to(tl.int64)
            old = slot >= 0
            if FRESH:
                old = tl.load(fresh + document) == 0
            at_state = memory + slot * memory_document + head * memory_head + of_state
            at_mass = mass + slot * mass_document + head * mass_head + component
            own_memory = tl.load(at_state, mask=old, other=0.0)
            own_mass = tl.load(at_mass, mask=old, other=0.0)
            begin = tl.load(first_row + document).to(tl.int64) * segments
            own_sums = sums + (begin * H + head) * size
            for _ in range(count):
                added = tl.load(own_sums + of_sums)
                added_mass = tl.load(own_sums + V * K + component)
                # Who writes a place need not be who has read it.
                tl.debug_barrier()
                tl.store(own_sums + of_sums, own_memory)
                tl.store(own_sums + V * K + component, own_mass)
                own_memory += added
                own_mass += added_mass
                own_sums += H * size
            tl.debug_barrier()
            tl.store(
                memory_after + slot * after_document + head * after_head + of_after, own_memory
            )
            at_mass = mass_after + slot * mass_after_document + head * mass_after_head + component
            tl.store(at_mass, own_mass)
    # The others by tiles of their states, DEPTH of their segments at once.
    for document in range(tl.program_id(2), documents, tl.num_programs(2)):
        count = tl.load(row_count + document).to(tl.int32) * segments
        if count > few:
            slot = tl.zeros((), tl.int64) + document
            if SLOTS:
                slot = tl.load(slots + document).to(tl.int64)
            old = here
            if FRESH:
                old = here & (tl.load(fresh + document) == 0)
            state = tl.load(
                memory + slot * memory_document + in_memory, mask=of_memory & old, other=0.0
            )
            state += tl.load(mass + slot * mass_document + in_mass, mask=of_mass & old, other=0.0)
            begin = tl.load(first_row + document).to(tl.int64) * segments
            own_sums = sums + (begin * H + head) * size
            for start in range(0, count, DEPTH):
                there = ((start + depth) < count)[:, None] & here[None, :]
                own = tl.load(own_sums + offsets, mask=there, other=0.0)
                upto = tl.cumsum(own, 0)
                tl.store(own_sums + offsets, state[None, :] + (upto - own), mask=there)
                state += tl.sum(own, 0)
                own_sums += DEPTH * H * size
            tl.store(memory_after + slot * after_document + in_after, state, mask=of_memory)
            at_mass = mass_after + slot * mass_after_document + in_mass_after
            tl.store(at_mass, state, mask=of_mass)


@triton.jit
def _read_block(
    queries, gammas, values, masses, out, memory, mass, there, inside, linear, quadratic, bias,
    epsilon, NORMALIZE: tl.constexpr, EPSILON: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Write a block's outputs; memory (v, K) after it. ALL tokens are there or some, and `inside`
    says which are in the row."""
    x = _load(queries, there, ALL)
    val = _load(values, there, ALL)
    gamma = _load(gammas, there, ALL)
    mass += tl.load(masses)
    reading, total = _posterior(x, linear, quadratic, bias, NORMALIZE, EPSILON)
    rounded = reading.to(val.dtype)
    token = tl.arange(0, x.shape[0])
    affinity = _dot(rounded, tl.trans(gamma))
    affinity = tl.where(token[:, None] >= token[None, :], affinity, 0.0)
    # Not divided by their sum: it cancels but for epsilon.
    weight = tl.sum(affinity, 1) + tl.sum(rounded.to(tl.float32) * mass[None, :], 1)
    weight += epsilon * total
    read = _recall(rounded, memory)
    read = _dot(affinity.to(val.dtype), val, read)
    inverse = 1.0 / weight
    if not ALL:
        inverse = tl.where(there, inverse, 0.0)
    _store(out, (read * inverse[:, None]).to(out.dtype.element_ty), inside, ALL)
    return _dot(tl.trans(val), gamma, memory)


@triton.jit
def _read_segments(
    q, gammas, masses, val, linear, quadratic, bias, lengths, before, out,
    q_row, q_token, q_head, v_row, v_token, v_head, C, segments, epsilon,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, EPSILON: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out (R, C, H, v), contiguous: each token's mean over what was written up to it.

    gammas and masses are those that `_sum_segments` kept.
    """
    head, row, first, here, width = _place(tl.program_id(0), lengths, segments, C, SEGMENT, H)
    token = tl.arange(0, BLOCK)
    component = tl.arange(0, K)
    value = tl.arange(0, V)
    out += ((row * C + first) * H + head) * V
    out_at = token[:, None] * (H * V) + value[None, :]
    if here > 0:
        A, B, b = _weights(linear, quadratic, bias, head, K, R)
        segment = tl.program_id(0).to(tl.int64)
        queries = q + row * q_row + first.to(tl.int64) * q_token + head * q_head
        queries += token[:, None] * q_token + tl.arange(0, R)[None, :]
        values = val + row * v_row + first.to(tl.int64) * v_token + head * v_head
        values += token[:, None] * v_token + value[None, :]
        gamma = gammas + ((row * H + head) * C + first) * K
        gamma += token[:, None] * K + component[None, :]
        inner = masses + segment * (SEGMENT // BLOCK) * K + component
        before += segment * (V + 1) * K
        memory = tl.load(before + value[:, None] * K + component[None, :])
        mass = tl.load(before + V * K + component)
        for _block in tl.range(0, here // BLOCK, num_stages=STAGES):
            memory = _read_block(
                queries, gamma, values, inner, out + out_at, memory, mass, token, token, A, B, b,
                epsilon, NORMALIZE, EPSILON, True,
            )  # fmt: skip
            queries += BLOCK * q_token
            values += BLOCK * v_token
            gamma += BLOCK * K
            inner += K
            out += BLOCK * H * V
        if here % BLOCK > 0:
            there = token < here % BLOCK
            inside = token < width - here // BLOCK * BLOCK
            _read_block(
                queries, gamma, values, inner, out + out_at, memory, mass, there, inside, A, B, b,
                epsilon, NORMALIZE, EPSILON, False,
            )  # fmt: skip
            out += BLOCK * H * V
    # Whoever multiplies by zero later what stands where no token is must not find NaN there.
    nothing = tl.zeros((BLOCK, V), out.dtype.element_ty)
    for start in range(tl.cdiv(here, BLOCK) * BLOCK, width, BLOCK):
        tl.store(out + out_at, nothing, mask=(start + token < width)[:, None])
        out += BLOCK * H * V


@triton.jit
def _read_states(
    q, linear, quadratic, bias, lengths, document, states, out,
    q_row, q_token, q_head, C, segments, epsilon,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, EPSILON: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out (R, C, H, v), contiguous: each token's mean over its document's (D, H, v + 1, K)."""
    head, row, first, here, width = _place(tl.program_id(0), lengths, segments, C, SEGMENT, H)
    token = tl.arange(0, BLOCK)
    component = tl.arange(0, K)
    value = tl.arange(0, V)
    out += ((row * C + first) * H + head) * V
    out_at = token[:, None] * (H * V) + value[None, :]
    if here > 0:
        A, B, b = _weights(linear, quadratic, bias, head, K, R)
        q += row * q_row + first.to(tl.int64) * q_token + head * q_head
        q_at = token[:, None] * q_token + tl.arange(0, R)[None, :]
        states += (tl.load(document + row).to(tl.int64) * H + head) * (V + 1) * K
        memory = tl.load(states + value[:, None] * K + component[None, :])
        mass = tl.load(states + V * K + component)
        for start in tl.range(0, here, BLOCK, num_stages=STAGES):
            there = start + token < here
            queries = tl.load(q + q_at, mask=there[:, None], other=0.0)
            reading, total = _posterior(queries, A, B, b, NORMALIZE, EPSILON)
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
