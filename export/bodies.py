"""The bodies of the operators of the domain ``ai.gma``, of standard operators.

A body computes in float32 whatever the activations' type. Documents meet nowhere in it: what is not
finite in a row or a state stays in its document.

Shapes: R rows of C tokens, D documents, W width, H heads, r routing_dim, K components, v value_dim,
T tail of the convolution, B block. Source of the mathematics: arXiv:2606.18283.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from gma.export.body import Body, Value
from gma.export.rows import Rows

BLOCK = 64
"""Tokens whose affinities are formed explicitly, as in `gma.model.ops.chunked`."""


def present(op: Body, x: Value, lengths: Value) -> Value:
    """Where x (R, C, ...) holds a token, (R, C, 1) bool; lengths (R,)."""
    return op.Unsqueeze(op.Range(0, op.count(x, 1), 1) < op.Unsqueeze(lengths, [1]), [2])


def _normalized(op: Body, x: Value, epsilon: Value) -> Value:
    """Divide x (..., n) float32 by the root of its mean square."""
    square = op.ReduceMean(x * x, [-1], keepdims=1)
    return x / op.Sqrt(square + epsilon)


def responsibilities(op: Body, x: Value, linear: Value, quadratic: Value, bias: Value) -> Value:
    """Score x (..., H, C, r) -> (..., H, C, K), which is >= 0 and sums to 1 over K."""
    normal = _normalized(op, x, op.attribute("routing_epsilon", "FLOAT"))
    normalize = op.Cast(op.attribute("normalize", "INT"), to=TensorProto.BOOL)
    x = op.Where(normalize, normal, x)
    both = op.Concat(x, x * x, axis=-1)
    weights = op.Transpose(op.Concat(linear, quadratic, axis=-1), perm=[0, 2, 1])
    return op.Softmax(both @ weights + op.Unsqueeze(bias, [1]), axis=-1)


@dataclass(frozen=True)
class Routed:
    """The projections of the rows' tokens, head by head, in float32; zeros where no token is."""

    queries_and_keys: Value  # (2, R, H, C, r)
    values: Value  # (R, H, C, v + 1): the mass is the memory of a value that is always one
    present: Value  # (R, C, 1) bool

    @classmethod
    def of(cls, op: Body, routed: Value, lengths: Value, linear: Value, values: Value) -> Routed:
        """Part routed (R, C, H * (2r + v)); linear (H, K, r) and ``values``, v as (1,) int64."""
        there = present(op, routed, lengths)
        wide = op.Where(there, op.Cast(routed, to=TensorProto.FLOAT), 0.0)
        heads, routing = op.size(linear, 0), op.size(linear, 2)
        width = heads * routing
        sizes = op.Concat(width * 2, heads * values, axis=0)
        scored, val = op.split(wide, sizes, axis=2)
        scored = op.Reshape(scored, op.Concat([0, 0, 2], heads, routing, axis=0))
        scored = op.Transpose(scored, perm=[2, 0, 3, 1, 4])
        val = op.Reshape(val, op.Concat([0, 0], heads, values, axis=0))
        val = op.Transpose(val, perm=[0, 2, 1, 3])
        ones = op.Expand(1.0, op.Concat(op.Shape(val, end=3), [1], axis=0))
        return cls(scored, op.Concat(val, ones, axis=3), there)

    def keys(self, op: Body, gamma: Value) -> Value:
        """Set responsibilities (R, H, C, K) to zero where no token is."""
        return gamma * op.Unsqueeze(op.Cast(self.present, to=TensorProto.FLOAT), [1])


def joined(op: Body, memory: Value, mass: Value) -> Value:
    """Join memory (..., K, v) and mass (..., K) to (..., K, v + 1)."""
    return op.Concat(memory, op.Unsqueeze(mass, [-1]), axis=-1)


def parted(op: Body, both: Value, values: Value) -> tuple[Value, Value]:
    """Part (..., v + 1) into (..., v) and (..., 1)."""
    return op.split(both, op.Concat(values, [1], axis=0), axis=-1)


def after(
    op: Body, rows: Rows, both: Value, memory: Value, mass: Value, fresh: Value
) -> dict[str, Value]:
    """Pick the documents' states from those after each row, ``both`` (R, H, K, v + 1)."""
    written, written_mass = parted(op, both, op.size(memory, -1))
    return {
        "memory_after": rows.after(op, written, memory, fresh),
        "mass_after": rows.after(op, op.Squeeze(written_mass, [-1]), mass, fresh),
    }


def _read(op: Body, summed: Value, values: Value, chunk: Value) -> Value:
    """Divide sums (R, H, C', v + 1) by their last column, the mass -> means (R, C, H * v)."""
    weighted, weight = parted(op, summed, values)
    means = op.Transpose(weighted / (weight + op.attribute("epsilon", "FLOAT")), perm=[0, 2, 1, 3])
    return op.Slice(op.Reshape(means, [0, 0, -1]), [0], chunk, [1])


def causal(
    op: Body,
    routed: Value,
    memory: Value,
    mass: Value,
    linear: Value,
    quadratic: Value,
    bias: Value,
    lengths: Value,
    document_of_row: Value,
    fresh: Value,
) -> dict[str, Value]:
    """Read, for each token, the mean of what it and its document's earlier tokens wrote.

    Inputs, outputs and attributes are those of ``CausalGMA`` in `gma.export.operators`.
    """
    rows = Rows.of(op, lengths, document_of_row, memory)
    chunk, values = op.size(routed, 1), op.size(memory, -1)
    # A short row is one block. A longer one is filled up with tokens that are not there.
    block = op.Min(chunk, [BLOCK])
    blocks = (chunk + block - 1) / block
    missing = blocks * block - chunk
    wide = op.Cast(routed, to=TensorProto.FLOAT)
    filled = op.Pad(wide, op.Concat([0, 0, 0, 0], missing, [0], axis=0))
    tokens = Routed.of(op, filled, lengths, linear, values)

    def split(x: Value) -> Value:  # (R, H, C', n) -> (R, H, blocks, B, n)
        return op.Reshape(x, op.Concat([0, 0], blocks, block, op.size(x, -1), axis=0))

    gamma = responsibilities(op, tokens.queries_and_keys, linear, quadratic, bias)
    gamma_q = split(op.Gather(gamma, 0))
    gamma_k = split(tokens.keys(op, op.Gather(gamma, 1)))
    written = split(tokens.values)
    keys = op.Transpose(gamma_k, perm=[0, 1, 2, 4, 3])

    sums = keys @ written  # (R, H, blocks, K, v + 1)
    of_row = op.ReduceSum(sums, [2], keepdims=0)
    flat = rows.before(op, op.Reshape(of_row, [0, -1]))
    before_row = op.Reshape(flat, op.Shape(of_row)) + joined(
        op, rows.incoming(op, memory, fresh), rows.incoming(op, mass, fresh)
    )
    # Exclusive: no block reads its own write twice.
    before = op.CumSum(sums, 2, exclusive=1) + op.Unsqueeze(before_row, [2])
    affinity = op.Trilu(gamma_q @ keys, upper=0)
    summed = affinity @ written + gamma_q @ before
    shape = op.Concat([0, 0], blocks * block, op.size(summed, -1), axis=0)
    out = _read(op, op.Reshape(summed, shape), values, chunk)
    out = op.Where(present(op, routed, lengths), out, 0.0)
    return {
        "out": op.CastLike(out, routed),
        **after(op, rows, before_row + of_row, memory, mass, fresh),
    }


def convolve(
    op: Body,
    x: Value,
    tail: Value,
    scale: Value,
    taps: Value,
    lengths: Value,
    document_of_row: Value,
    fresh: Value,
) -> dict[str, Value]:
    """Add to x the causal depthwise convolution of its normalised tokens.

    Inputs, outputs and attributes are those of ``ShortConvolution`` in `gma.export.operators`.
    """
    rows = Rows.of(op, lengths, document_of_row, tail)
    epsilon = op.attribute("epsilon", "FLOAT")
    wide = op.Cast(x, to=TensorProto.FLOAT)
    own = _normalized(op, wide, epsilon) * scale
    reach, chunk = op.count(tail, 1), op.count(x, 1)
    # A row is preceded by its document's previous row, which is full, or by its document's tail.
    ends = op.Slice(own, op.size(x, 1) - op.size(tail, 1), op.size(x, 1), [1])
    previous = op.Gather(ends, op.Max(rows.index - 1, 0))
    count = op.ReduceSum(op.Cast(rows.earlier, to=TensorProto.INT64), [1], keepdims=0)
    before = op.Where(op.spread(count > 0, own), previous, rows.incoming(op, tail, fresh))
    seen = op.Concat(before, own, axis=1)
    window = op.Unsqueeze(op.Range(0, chunk, 1), [1]) + op.Range(0, reach + 1, 1)
    update = op.ReduceSum(op.Gather(seen, window, axis=1) * taps, [2], keepdims=0)
    y = op.CastLike(wide + update, x)
    normal = _normalized(op, op.Cast(y, to=TensorProto.FLOAT), epsilon)
    # Token t of a row lies at t + T, so the last T of its first n tokens start at n.
    start = rows.index * (reach + chunk) + lengths
    at = op.Unsqueeze(start, [1]) + op.Range(0, reach, 1)
    flat = op.Reshape(seen, op.Concat([-1], op.size(x, -1), axis=0))
    return {
        "y": y,
        "normal": op.CastLike(normal, x),
        "tail_after": rows.after(op, op.Gather(flat, at), tail, fresh),
    }


def normalize(op: Body, x: Value) -> dict[str, Value]:
    """Divide x (..., n) by the root of its mean square; see ``Normalize``."""
    wide = op.Cast(x, to=TensorProto.FLOAT)
    return {"normal": op.CastLike(_normalized(op, wide, op.attribute("epsilon", "FLOAT")), x)}


def multiply(op: Body, x: Value, weight: Value, residual: Value | None = None) -> dict[str, Value]:
    """Multiply x (..., I) with weight (I, O), in float32; see ``Linear``."""
    product = op.Cast(x, to=TensorProto.FLOAT) @ op.Cast(weight, to=TensorProto.FLOAT)
    y = op.choose(
        op.attribute("activation", "STRING").equals("gelu"),
        lambda branch: branch.Gelu(product, approximate="tanh"),
        lambda branch: branch.Identity(product),
    )
    if residual is not None:
        y = y + op.Cast(residual, to=TensorProto.FLOAT)
    return {"y": op.CastLike(y, x)}
