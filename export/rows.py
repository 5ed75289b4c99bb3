"""Which rows of a step belong together, as nodes of an operator's body.

Shapes: R rows of C tokens, D documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from onnx import TensorProto

from gma.export.body import Body, Value

NAN = float("nan")


@dataclass(frozen=True)
class Rows:
    """The documents of a step's rows: `gma.model.ops.chunked.Rows`, as nodes."""

    used: Value  # (R,) bool
    document: Value  # (R,) int64
    earlier: Value  # (R, R) bool: column's row is of the same document, and before
    last: Value  # (D,) int64: the document's last row, -1 if it has none
    index: Value  # (R,) int64: 0, 1, ...

    @classmethod
    def of(cls, op: Body, lengths: Value, document: Value, states: Value) -> Self:
        """Find them of lengths (R,) and document_of_row (R,); states (D, ...) tell D."""
        used = lengths > 0
        index = op.Range(0, op.count(lengths, 0), 1)
        same = op.Unsqueeze(document, [1]).equals(document) & used
        earlier = same & op.Unsqueeze(used, [1]) & (index < op.Unsqueeze(index, [1]))
        documents = op.Range(0, op.count(states, 0), 1)
        belongs = op.Unsqueeze(documents, [1]).equals(document) & used
        last = op.ReduceMax(op.Where(belongs, index, -1), [1], keepdims=0)
        return cls(used, document, earlier, last, index)

    def incoming(self, op: Body, states: Value, fresh: Value) -> Value:
        """Pick each row's state, (D, ...) -> (R, ...): zeros if it is fresh or the row not used."""
        holds = self.used & ~op.Gather(fresh, self.document)
        gathered = op.Gather(states, self.document)
        return op.Where(op.spread(holds, gathered), gathered, 0.0)

    def after(self, op: Body, of_rows: Value, states: Value, fresh: Value) -> Value:
        """Pick the states (D, ...) after the step from those after each row, ``of_rows`` (R, ...).

        A document without rows keeps its own, or zeros if it is fresh. States are picked, never
        multiplied: nothing gets from one into another.
        """
        own = op.Where(op.spread(fresh, states), 0.0, states)
        picked = op.Gather(of_rows, op.Max(self.last, 0))
        has_rows = self.last > -1
        return op.Where(op.spread(has_rows, states), picked, own)

    def before(self, op: Body, sums: Value) -> Value:
        """Add up what each document's earlier rows summed: ``sums`` (R, X) -> (R, X)."""
        # A sum that is not finite would reach every row through 0 * NaN: it is taken out of the
        # product, and makes the rows after it NaN again, which are its document's.
        bad = op.IsNaN(op.ReduceSum(sums * 0.0, [1], keepdims=1))
        earlier = op.Cast(self.earlier, to=TensorProto.FLOAT)
        prefix = earlier @ op.Where(bad, 0.0, sums)
        after_bad = earlier @ op.Cast(bad, to=TensorProto.FLOAT) > 0.0
        return op.Where(after_bad, NAN, prefix)

    def forgetting(
        self, op: Body, sums: Value, forgotten: Value, incoming: Value
    ) -> tuple[Value, Value]:
        """Return the states before each row and after it, (R, H, X), where rows forget.

        ``sums`` (R, H, X): what a row wrote and has not forgotten at its end. ``forgotten`` (R, H)
        float64: exp(-forgotten) is left there of what it found. ``incoming`` (R, H, X).
        """
        # As in `before`: what is not finite is taken out of the products.
        bad = op.Unsqueeze(op.IsNaN(op.ReduceSum(sums * 0.0, [1, 2], keepdims=0)), [1])
        nothing = op.Cast(0.0, to=TensorProto.DOUBLE)
        own = op.Where(bad, nothing, forgotten)
        found = op.Cast(self.earlier, to=TensorProto.DOUBLE) @ own  # (R, H)
        upto = op.Transpose(found + own, perm=[1, 0])
        between = op.Unsqueeze(upto, [1]) - op.Unsqueeze(op.Transpose(found, perm=[1, 0]), [2])
        left = op.Where(self.earlier, op.Cast(op.Exp(between), to=TensorProto.FLOAT), 0.0)
        bad = op.Unsqueeze(bad, [2])
        clean = op.Transpose(op.Where(bad, 0.0, sums), perm=[1, 0, 2])
        before = op.Transpose(left @ clean, perm=[1, 0, 2])
        before = before + _left(op, found) * incoming
        earlier = op.Cast(self.earlier, to=TensorProto.FLOAT)
        flat = op.Squeeze(op.Cast(bad, to=TensorProto.FLOAT), [2])
        after_bad = op.Unsqueeze(earlier @ flat > 0.0, [2])
        before = op.Where(after_bad, NAN, before)
        return before, sums + _left(op, forgotten) * before


def _left(op: Body, forgotten: Value) -> Value:
    """What is left where so much was forgotten, (R, H) float64 -> (R, H, 1) float32."""
    return op.Unsqueeze(op.Cast(op.Exp(op.Neg(forgotten)), to=TensorProto.FLOAT), [2])
