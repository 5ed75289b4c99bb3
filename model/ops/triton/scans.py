"""Triton kernels that combine a document's segments: exclusive prefixes forward, suffixes backward.

Shapes: as in `gma.model.ops.triton.forward`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _compose(first_decay, first_sum, then_decay, then_sum):
    """Two stretches of a document as one: what is left of what it found, and what it wrote."""
    return then_decay * first_decay, then_decay * first_sum + then_sum


@triton.jit
def _scan(
    sums, decays, decay_step, state, own_step, count, start, at, here,
    DEPTH: tl.constexpr, FORGET: tl.constexpr,
):  # fmt: skip
    """Put the states before DEPTH stretches in the place of their sums; return that after them.

    sums and decays point to the first stretch's, `own_step` and `decay_step` apart; state (TILE,)
    is what it finds.
    """
    depth = tl.arange(0, DEPTH)
    inside = (start + depth) < count
    there = inside[:, None] & here[None, :]
    offsets = depth[:, None] * own_step + at[None, :]
    own = tl.load(sums + offsets, mask=there, other=0.0)
    if FORGET:
        decay = tl.load(decays + depth * decay_step, mask=inside, other=1.0)
        # Exclusive: of the stretch before each.
        follows = (depth > 0) & ((start + depth) <= count)
        of_last = follows[:, None] & here[None, :]
        last = tl.load(sums + offsets - own_step, mask=of_last, other=0.0)
        left = tl.load(decays + (depth - 1) * decay_step, mask=follows, other=1.0)
        left = tl.broadcast_to(left[:, None], DEPTH, at.shape[0])
        left, last = tl.associative_scan((left, last), 0, _compose)
        before = left * state[None, :] + last
        after = decay[:, None] * before + own
        state = tl.sum(tl.where((depth == DEPTH - 1)[:, None], after, 0.0), 0)
        # What is written here is read by others.
        tl.debug_barrier()
    else:
        upto = tl.cumsum(own, 0)
        before = state[None, :] + (upto - own)
        state += tl.sum(own, 0)
    tl.store(sums + offsets, before, mask=there)
    return state


@triton.jit
def _follow(
    sums, decays, decay_step, state, own_step, count, at, here,
    DEPTH: tl.constexpr, FORGET: tl.constexpr,
):  # fmt: skip
    """Put the states before up to DEPTH of `count` stretches in the place of their sums, one after
    the other; return that after them. For the rest see `_scan`."""
    added, left = (), ()
    for depth in tl.static_range(DEPTH):  # all at once: each by itself would be waited for
        there = here & (depth < count)
        own = tl.load(sums + depth * own_step + at, mask=there, other=0.0)
        added += (own,)  # type: ignore[assignment]
        if FORGET:
            share = tl.load(decays + depth * decay_step, mask=depth < count, other=1.0)
            left += (share,)  # type: ignore[assignment]
    # Who writes a place need not be who has read it.
    tl.debug_barrier()
    for depth in tl.static_range(DEPTH):
        tl.store(sums + depth * own_step + at, state, mask=here & (depth < count))
        if FORGET:
            state = tl.fma(state, tl.broadcast_to(left[depth], state.shape), added[depth])
        else:
            state += added[depth]
    return state


@triton.jit
def prefix(
    sums, decays, memory, mass, memory_after, mass_after, first_row, row_count, slots, fresh,
    documents,
    memory_document, memory_head, memory_component, mass_document, mass_head,
    after_document, after_head, after_component, mass_after_document, mass_after_head, segments,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    FRESH: tl.constexpr, SLOTS: tl.constexpr, FORGET: tl.constexpr,
):  # fmt: skip
    """Put each document's incoming state plus its earlier segments in the place of their sums.

    Segments are added one after the other, so that a state is the same whichever of them share a
    step. With FORGET, a segment leaves `decays` (G, H) of what it finds.
    With FRESH, what is in the state of a document that is fresh means nothing. With SLOTS, a
    document's state lies in its slot of memory and mass, and stays as it is if it has no rows.
    """
    head = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    of_memory = at < V * K
    of_mass = (at >= V * K) & (at < (V + 1) * K)
    here = at < (V + 1) * K
    size: tl.constexpr = (V + 1) * K
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
            if FORGET:
                own_decays = decays + begin * H + head
            for _ in range(count):
                added = tl.load(own_sums + of_sums)
                added_mass = tl.load(own_sums + V * K + component)
                # Who writes a place need not be who has read it.
                tl.debug_barrier()
                tl.store(own_sums + of_sums, own_memory)
                tl.store(own_sums + V * K + component, own_mass)
                if FORGET:
                    left = tl.load(own_decays)
                    own_memory = tl.fma(own_memory, tl.broadcast_to(left, K, V), added)
                    own_mass = tl.fma(own_mass, tl.broadcast_to(left, K), added_mass)
                    own_decays += H
                else:
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
            own_decays = decays
            if FORGET:
                own_decays += begin * H + head
            for start in range(0, count, DEPTH):
                state = _follow(
                    own_sums, own_decays, H, state, H * size, count - start, at, here, DEPTH, FORGET
                )
                own_sums += DEPTH * H * size
                if FORGET:
                    own_decays += DEPTH * H
            tl.store(memory_after + slot * after_document + in_after, state, mask=of_memory)
            at_mass = mass_after + slot * mass_after_document + in_mass_after
            tl.store(at_mass, state, mask=of_mass)


@triton.jit
def suffix(
    sums, decays, after, before, first_row, row_count, segments,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    FORGET: tl.constexpr,
):  # fmt: skip
    """Put each document's state gradient after the step plus its later segments in the place of
    their sums, and the state gradient before the step in `before`.

    After and before are (D, H, v + 1, K).
    """
    head = tl.program_id(1).to(tl.int64)
    document = tl.program_id(2).to(tl.int64)
    size: tl.constexpr = (V + 1) * K
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    here = at < size
    of_document = (document * H + head) * size
    state = tl.load(after + of_document + at, mask=here, other=0.0)
    count = tl.load(row_count + document).to(tl.int32) * segments
    end = tl.load(first_row + document).to(tl.int64) * segments + count
    # From the last segment on.
    sums += ((end - 1) * H + head) * size
    if FORGET:
        decays += (end - 1) * H + head
    for start in range(0, count, DEPTH):
        state = _scan(sums, decays, -H, state, -H * size, count, start, at, here, DEPTH, FORGET)
        sums -= DEPTH * H * size
        if FORGET:
            decays -= DEPTH * H
    tl.store(before + of_document + at, state, mask=here)
