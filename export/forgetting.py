"""The body of the operator ``ForgettingGMA``, of standard operators.

Within a block everything is in units of what its first token finds, as in
`gma.model.ops.forgetting`. What is forgotten is added up in float64: how exact a difference of two
sums is must not depend on what was forgotten before both.

Shapes: R rows of C tokens, D documents, H heads, r routing_dim, K components, v value_dim, B block.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from gma.export.bodies import (
    BLOCK,
    Routed,
    after,
    joined,
    parted,
    present,
    responsibilities,
)
from gma.export.body import Body, Value
from gma.export.rows import Rows

DOUBLE, FLOAT = TensorProto.DOUBLE, TensorProto.FLOAT


def _rates(op: Body, projected: Value, there: Value, keep_bias: Value, heads: Value) -> Value:
    """Compute the rates at which all heads forget, (R, H, C) float64, 0 where no token is.

    Projected (R, C, F) of those that do, the last ones; there (R, C, 1) bool.
    """
    # The softplus, exact where it is tiny: it is cut long before it is linear.
    least = op.Cast(op.Min(projected + keep_bias, 0.0), to=DOUBLE)
    exact = op.Log(op.Exp(least) + op.Cast(1.0, to=DOUBLE))
    rates = op.Min(op.Cast(exact, to=FLOAT), op.attribute("most_forgotten", "FLOAT"))
    lasting = heads - op.size(keep_bias, 0)
    rates = op.Pad(rates, op.Concat([0, 0], lasting, [0, 0, 0], axis=0))
    rates = op.Cast(op.Where(there, rates, 0.0), to=DOUBLE)
    return op.Transpose(rates, perm=[0, 2, 1])


def forgetting(
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
    keep_bias: Value,
) -> dict[str, Value]:
    """Let each token forget, write, and read what is left of all up to it, through its gate.

    Inputs, outputs and attributes are those of ``ForgettingGMA`` in `gma.export.operators`.
    """
    rows = Rows.of(op, lengths, document_of_row, memory)
    chunk, values = op.size(routed, 1), op.size(memory, -1)
    # A short row is one block. A longer one is filled up with tokens that are not there.
    block = op.Min(chunk, [BLOCK])
    blocks = (chunk + block - 1) / block
    missing = blocks * block - chunk
    filled = op.Pad(op.Cast(routed, to=FLOAT), op.Concat([0, 0, 0, 0], missing, [0], axis=0))
    width = op.size(linear, 0) * (op.size(linear, 2) * 2 + values)
    own, others = op.split(filled, op.Concat(width, op.size(routed, 2) - width, axis=0), axis=2)
    tokens = Routed.of(op, own, lengths, linear, values)
    others = op.Where(tokens.present, others, 0.0)
    heads = op.size(linear, 0)
    read = heads * values
    opened = op.Sigmoid(op.Slice(others, [0], read, [2]))
    rates = op.Slice(others, read, read + op.size(keep_bias, 0), [2])
    rates = _rates(op, rates, tokens.present, keep_bias, heads)

    def split(x: Value) -> Value:  # (R, H, C', ...) -> (R, H, blocks, B, ...)
        return op.Reshape(x, op.Concat([0, 0], blocks, block, op.Shape(x, start=3), axis=0))

    gamma = responsibilities(op, tokens.queries_and_keys, linear, quadratic, bias)
    gamma_k = tokens.keys(op, op.Gather(gamma, 1))
    usage = op.ReduceSum(gamma_k, [2], keepdims=0)
    rates = split(rates)
    grown = op.Unsqueeze(op.Cast(op.Exp(op.CumSum(rates, 3)), to=FLOAT), [4])
    gamma_q, written = split(op.Gather(gamma, 0)), split(tokens.values)
    keys = op.Transpose(split(gamma_k) * grown, perm=[0, 1, 2, 4, 3])

    forgotten = op.ReduceSum(rates, [3], keepdims=0)  # (R, H, blocks)
    left = op.Cast(op.Exp(op.Neg(forgotten)), to=FLOAT)
    sums = (keys @ written) * op.Unsqueeze(left, [3, 4])  # (R, H, blocks, K, v + 1)
    shape = op.Shape(sums)
    stretches = _InRow.of(op, op.Reshape(sums, [0, 0, 0, -1]), forgotten)
    incoming = joined(op, rows.incoming(op, memory, fresh), rows.incoming(op, mass, fresh))
    before_row, after_row = rows.forgetting(
        op, stretches.of_row, stretches.forgotten, op.Reshape(incoming, [0, 0, -1])
    )
    before = op.Reshape(stretches.before(op, before_row), shape)
    states = op.Reshape(after_row, op.Shape(incoming))

    affinity = op.Trilu(gamma_q @ keys, upper=0)
    weighted, weight = parted(op, affinity @ written + gamma_q @ before, values)
    means = weighted / (weight + grown * op.attribute("epsilon", "FLOAT"))
    means = op.Reshape(means, op.Concat([0, 0], blocks * block, values, axis=0))
    out = op.Reshape(op.Transpose(means, perm=[0, 2, 1, 3]), [0, 0, -1]) * opened
    out = op.Slice(out, [0], chunk, [1])
    return {
        "out": op.CastLike(op.Where(present(op, routed, lengths), out, 0.0), routed),
        **after(op, rows, states, memory, mass, fresh),
        "usage": usage,
    }


@dataclass(frozen=True)
class _InRow:
    """What a row's blocks wrote, X numbers for each head, as its places find it."""

    of_row: Value  # (R, H, X): at the row's end
    forgotten: Value  # (R, H) float64: from the row's beginning to its end
    of_earlier: Value  # (R, H, blocks, X): before each block
    until: Value  # (R, H, blocks) float64: forgotten before it

    @classmethod
    def of(cls, op: Body, sums: Value, forgotten: Value) -> _InRow:
        """Combine sums (R, H, blocks, X), as they are at each block's end."""
        upto, until = op.CumSum(forgotten, 2), op.CumSum(forgotten, 2, exclusive=1)
        whole = op.ReduceSum(forgotten, [2], keepdims=1)
        places = op.Concat(until, whole, axis=2)  # each block's beginning, and the row's end
        left = op.Exp(op.Unsqueeze(upto, [2]) - op.Unsqueeze(places, [3]))
        blocks = op.count(forgotten, 2)
        earlier = op.Unsqueeze(op.Range(0, blocks + 1, 1), [1]) > op.Range(0, blocks, 1)
        found = op.Where(earlier, op.Cast(left, to=FLOAT), 0.0) @ sums
        sizes = op.Concat(op.size(forgotten, 2), [1], axis=0)
        of_earlier, of_row = op.split(found, sizes, axis=2)
        return cls(op.Squeeze(of_row, [2]), op.Squeeze(whole, [2]), of_earlier, until)

    def before(self, op: Body, before_row: Value) -> Value:
        """Return the states before the blocks, (R, H, blocks, X), of those before rows."""
        left = op.Unsqueeze(op.Cast(op.Exp(op.Neg(self.until)), to=FLOAT), [3])
        return self.of_earlier + left * op.Unsqueeze(before_row, [2])
