"""Triton kernels of the operation backward. `gma.model.ops.triton.gradients` launches them.

An output is a ratio, out = y[:v] / d with d = y[v] + epsilon and y = gamma(q) @ state, the last
column the mass. With pull = out . dout / d,

    dy = [dout / d, -pull]          dgamma(q) = state up to the token @ dy
    dgamma(k) = state gradient from the token on @ [val, 1]
    dval = (gamma(k) @ state gradient from the token on)[:v]

where the state gradient is the gradient of the state after the step plus the sum of gamma(q) (x) dy
over the tokens that read: a suffix, as the state is a prefix. So four kernels: queries, segment by
segment from the state before it; each document's exclusive suffix of what those sum
(`gma.model.ops.triton.scans`); keys, segment by segment from the state gradient after it,
backwards; and from the gradients of scores to those of tokens and mixture
(`gma.model.ops.triton.scores`). Responsibilities are computed again from the tokens; the gradients
of scores, N * K, are the largest thing that is written. Documents meet in no sum but in the
gradients of the mixture, which they share.

Shapes: as in `gma.model.ops.triton.forward`. States and their gradients are (G, H, v + 1, K), or
(D, H, v + 1, K), the documents', where every token reads and writes the whole.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gma.model.ops.triton.device import dot, dot_all, factor, head_mixture, locate, posterior


@triton.jit
def _responsibilities(x, A, B, b, there, NORMALIZE: tl.constexpr, EPSILON: tl.constexpr):
    """x (B, r) -> (B, K) float32; zeros where no token is."""
    weights, total = posterior(x, A, B, b, NORMALIZE, EPSILON)
    return weights * tl.where(there, 1.0 / total, 0.0)[:, None]


@triton.jit
def _of_scores(gamma, gradient):
    """The softmax backward: gradients (B, K) of responsibilities -> of scores."""
    return gamma * (gradient - tl.sum(gamma * gradient, 1)[:, None])


@triton.jit
def query_gradients(
    q, k, val, grown, left, linear, quadratic, bias, lengths, document, states, d_out,
    d_scores, inverse, pull, sums, ends,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, C, segments, epsilon,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, EPSILON: tl.constexpr, STAGES: tl.constexpr, CAUSAL: tl.constexpr,
    FORGET: tl.constexpr,
):  # fmt: skip
    """Gradients of queries' scores (R, C, H, K), 1 / d and pull (R, C, H), segments' sums.

    Causal: the states are those before the segments, and keys and values of the segment add to
    them. Otherwise they are the documents', and k and val are None. What stands where no token
    is stays as it was, but the sums of every segment are written. With FORGET, 1 / d and pull are
    in a block's own units, see `units.convert`, and `ends` gets the states after segments that
    have tokens.
    """
    head, row, first, here, _ = locate(tl.program_id(0), lengths, segments, C, SEGMENT, H)
    token = tl.arange(0, BLOCK)
    component = tl.arange(0, K)
    value = tl.arange(0, V)
    size: tl.constexpr = (V + 1) * K
    # Held as they are stored: values by components.
    d_memory = tl.zeros((V, K), tl.float32)
    d_mass = tl.zeros((K,), tl.float32)
    if here > 0:
        A, B, b = head_mixture(linear, quadratic, bias, head, K, R)
        if CAUSAL:
            states += tl.program_id(0).to(tl.int64) * size
        else:
            states += (tl.load(document + row).to(tl.int64) * H + head) * size
        memory = tl.load(states + value[:, None] * K + component[None, :])
        mass = tl.load(states + V * K + component)
        q += row * q_row + first.to(tl.int64) * q_token + head * q_head
        q_at = token[:, None] * q_token + tl.arange(0, R)[None, :]
        if CAUSAL:
            k += row * k_row + first.to(tl.int64) * k_token + head * k_head
            k_at = token[:, None] * k_token + tl.arange(0, R)[None, :]
            val += row * v_row + first.to(tl.int64) * v_token + head * v_head
            v_at = token[:, None] * v_token + value[None, :]
        at = (row * C + first) * H + head
        inverse += at
        pull += at
        d_out += at * V
        d_scores += at * K
        if FORGET:
            units_at = (row * H + head) * C + first + token
            lefts = left + (row * H + head) * tl.cdiv(C, BLOCK) + first // BLOCK
        kept = 1.0
        out_at = token[:, None] * (H * V) + value[None, :]
        scores_at = token[:, None] * (H * K) + component[None, :]
        earlier = token[:, None] >= token[None, :]
        for start in tl.range(0, here, BLOCK, num_stages=STAGES):
            there = start + token < here
            queries = tl.load(q + q_at, mask=there[:, None], other=0.0)
            d_means = tl.load(d_out + out_at, mask=there[:, None], other=0.0).to(tl.float32)
            reading = _responsibilities(queries, A, B, b, there, NORMALIZE, EPSILON)
            read = factor(reading, queries)
            weight = tl.sum(read.to(tl.float32) * mass[None, :], 1)
            if FORGET:
                units = tl.load(grown + units_at, mask=there, other=1.0)
                weight += epsilon * units
            else:
                weight += epsilon
            if CAUSAL:
                keys = tl.load(k + k_at, mask=there[:, None], other=0.0)
                values = factor(tl.load(val + v_at, mask=there[:, None], other=0.0), queries)
                writing = _responsibilities(keys, A, B, b, there, NORMALIZE, EPSILON)
                if FORGET:
                    writing *= units[:, None]
                written = factor(writing, queries)
                affinity = tl.where(earlier, dot(read, tl.trans(written)), 0.0)
                weight += tl.sum(affinity, 1)
            over = tl.where(there, 1.0 / weight, 0.0)
            d_read = factor(d_means * over[:, None], queries)
            # All digits: after many tokens the components' means are nearly one and the same.
            d_reading = dot_all(d_read, memory)
            # Out . dout from what it is subtracted from, so that their roundings cancel too.
            pulled = tl.sum(read.to(tl.float32) * d_reading, 1)
            if CAUSAL:
                d_affinity = dot(d_read, tl.trans(values))
                pulled += tl.sum(affinity * d_affinity, 1)
            pulled *= over
            d_reading -= pulled[:, None] * mass[None, :]
            if CAUSAL:
                d_affinity = tl.where(earlier, d_affinity - pulled[:, None], 0.0)
                d_reading = dot(factor(d_affinity, queries), written, d_reading)
                memory = dot(tl.trans(values), written, memory)
                mass += tl.sum(written.to(tl.float32), 0)
                k += BLOCK * k_token
                val += BLOCK * v_token
            if FORGET:
                d_memory += kept * dot(tl.trans(d_read), read)
                d_mass -= kept * tl.sum(pulled[:, None] * read.to(tl.float32), 0)
                share = tl.load(lefts)
                memory *= share
                mass *= share
                kept *= share
                units_at += BLOCK
                lefts += 1
            else:
                d_memory = dot(tl.trans(d_read), read, d_memory)
                d_mass -= tl.sum(pulled[:, None] * read.to(tl.float32), 0)
            scores = _of_scores(reading, d_reading).to(d_scores.dtype.element_ty)
            tl.store(d_scores + scores_at, scores, mask=there[:, None])
            tl.store(inverse + token * H, over, mask=there)
            tl.store(pull + token * H, pulled, mask=there)
            q += BLOCK * q_token
            d_out += BLOCK * H * V
            d_scores += BLOCK * H * K
            inverse += BLOCK * H
            pull += BLOCK * H
        if FORGET:
            ends += tl.program_id(0).to(tl.int64) * size
            tl.store(ends + value[:, None] * K + component[None, :], memory)
            tl.store(ends + V * K + component, mass)
    sums += tl.program_id(0).to(tl.int64) * size
    tl.store(sums + value[:, None] * K + component[None, :], d_memory)
    tl.store(sums + V * K + component, d_mass)


@triton.jit
def key_gradients(
    q, k, val, grown, left, linear, quadratic, bias, lengths, document, d_states, ends, d_out,
    inverse, pull, d_scores, d_val, d_log_keep,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, C, segments, epsilon,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, EPSILON: tl.constexpr, STAGES: tl.constexpr, CAUSAL: tl.constexpr,
    FORGET: tl.constexpr,
):  # fmt: skip
    """Gradients of keys' scores (R, C, H, K) and of the values (R, C, H, v), contiguous.

    Causal: the state gradients are those after the segments, and the segment's queries add to them.
    Otherwise they are the documents', and q, d_out, inverse and pull are None. Values where no
    token is get zeros; scores there stay as they were.

    With FORGET also those of the logarithms of what tokens keep, (R, C, H), zeros where no token
    is. Such a gradient is the sum over the token and all later ones of the gradients of what is
    kept from the document's beginning up to each; behind the segment that is the product of the
    state after it, in `ends`, with its gradient.
    """
    head, row, first, here, width = locate(tl.program_id(0), lengths, segments, C, SEGMENT, H)
    token = tl.arange(0, BLOCK)
    component = tl.arange(0, K)
    value = tl.arange(0, V)
    at = (row * C + first) * H + head
    out_at = token[:, None] * (H * V) + value[None, :]
    blocks = tl.cdiv(here, BLOCK)
    size: tl.constexpr = (V + 1) * K
    if here > 0:
        A, B, b = head_mixture(linear, quadratic, bias, head, K, R)
        if CAUSAL:
            d_states += tl.program_id(0).to(tl.int64) * size
        else:
            d_states += (tl.load(document + row).to(tl.int64) * H + head) * size
        d_memory = tl.load(d_states + value[:, None] * K + component[None, :])
        d_mass = tl.load(d_states + V * K + component)
        if FORGET:
            ends += tl.program_id(0).to(tl.int64) * size
            end = tl.load(ends + value[:, None] * K + component[None, :])
            later_ones = tl.sum(tl.sum(end * d_memory, 1), 0)
            later_ones += tl.sum(tl.load(ends + V * K + component) * d_mass, 0)
        last = (blocks - 1) * BLOCK
        k += row * k_row + (first + last).to(tl.int64) * k_token + head * k_head
        k_at = token[:, None] * k_token + tl.arange(0, R)[None, :]
        val += row * v_row + (first + last).to(tl.int64) * v_token + head * v_head
        v_at = token[:, None] * v_token + value[None, :]
        at_last = at + last.to(tl.int64) * H
        if CAUSAL:
            q += row * q_row + (first + last).to(tl.int64) * q_token + head * q_head
            q_at = token[:, None] * q_token + tl.arange(0, R)[None, :]
            inverse += at_last
            pull += at_last
            d_out += at_last * V
        if FORGET:
            units_at = (row * H + head) * C + first + last + token
            lefts = left + (row * H + head) * tl.cdiv(C, BLOCK) + first // BLOCK + blocks - 1
            d_kept = d_log_keep + at_last
        d_scores += at_last * K
        d_values = d_val + at_last * V
        scores_at = token[:, None] * (H * K) + component[None, :]
        later = token[:, None] <= token[None, :]
        for done in tl.range(0, last + BLOCK, BLOCK, num_stages=STAGES):
            there = last - done + token < here
            keys = tl.load(k + k_at, mask=there[:, None], other=0.0)
            values = factor(tl.load(val + v_at, mask=there[:, None], other=0.0), keys)
            gamma = _responsibilities(keys, A, B, b, there, NORMALIZE, EPSILON)
            writing = gamma
            if FORGET:
                units = tl.load(grown + units_at, mask=there, other=0.0)
                writing *= units[:, None]
                share = tl.load(lefts)
                d_memory *= share
                d_mass *= share
            written = factor(writing, keys)
            state = factor(d_memory, keys)
            d_writing = dot(values, state) + d_mass[None, :]
            d_value = dot(written, tl.trans(state))
            if CAUSAL:
                queries = tl.load(q + q_at, mask=there[:, None], other=0.0)
                reading = _responsibilities(queries, A, B, b, there, NORMALIZE, EPSILON)
                read = factor(reading, keys)
                d_means = tl.load(d_out + out_at, mask=there[:, None], other=0.0).to(tl.float32)
                over = tl.load(inverse + token * H, mask=there, other=0.0)
                pulled = tl.load(pull + token * H, mask=there, other=0.0)
                d_read = factor(d_means * over[:, None], keys)
                affinity = tl.where(later, dot(written, tl.trans(read)), 0.0)
                d_affinity = dot(values, tl.trans(d_read)) - pulled[None, :]
                d_affinity = tl.where(later, d_affinity, 0.0)
                d_writing = dot(factor(d_affinity, keys), read, d_writing)
                d_value = dot(factor(affinity, keys), d_read, d_value)
                d_memory = dot(tl.trans(d_read), read, d_memory)
                d_mass -= tl.sum(pulled[:, None] * read.to(tl.float32), 0)
                q -= BLOCK * q_token
                inverse -= BLOCK * H
                pull -= BLOCK * H
                d_out -= BLOCK * H * V
            if FORGET:
                d_units = -tl.sum(gamma * d_writing, 1)
                if CAUSAL:
                    d_units += epsilon * pulled
                d_upto = units * d_units
                d_own = tl.cumsum(d_upto, 0, reverse=True) + later_ones
                later_ones += tl.sum(d_upto, 0)
                inside = last - done + token < width
                tl.store(d_kept + token * H, tl.where(there, d_own, 0.0), mask=inside)
                d_writing *= units[:, None]
                units_at -= BLOCK
                lefts -= 1
                d_kept -= BLOCK * H
            scores = _of_scores(gamma, d_writing).to(d_scores.dtype.element_ty)
            tl.store(d_scores + scores_at, scores, mask=there[:, None])
            d_value = tl.where(there[:, None], d_value, 0.0).to(d_val.dtype.element_ty)
            inside = last - done + token < width
            tl.store(d_values + out_at, d_value, mask=inside[:, None])
            k -= BLOCK * k_token
            val -= BLOCK * v_token
            d_scores -= BLOCK * H * K
            d_values -= BLOCK * H * V
    at += blocks.to(tl.int64) * BLOCK * H
    d_val += at * V
    if FORGET:
        d_log_keep += at
    nothing = tl.zeros((BLOCK, V), d_val.dtype.element_ty)
    for start in range(blocks * BLOCK, width, BLOCK):
        tl.store(d_val + out_at, nothing, mask=(start + token < width)[:, None])
        d_val += BLOCK * H * V
        if FORGET:
            tl.store(
                d_log_keep + token * H, tl.zeros((BLOCK,), tl.float32), mask=start + token < width
            )
            d_log_keep += BLOCK * H
