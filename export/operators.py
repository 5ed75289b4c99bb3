"""The operators of the domain ``ai.gma``: their schemas, and their bodies of standard operators.

A body computes in float32 whatever the activations' type, and is what runs where no library of
kernels takes its place. Documents meet nowhere in it: whatever is not finite in a row or a state,
stays in its document.

Shapes: R rows of C tokens, D documents, W width, H heads, r routing_dim, K components, v value_dim,
T tail of the convolution, B block. Source of the mathematics: arXiv:2606.18283.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from onnx import FunctionProto, TensorProto
from onnx.defs import OpSchema, has, register_schema

from gma.export.body import Body, Value

DOMAIN = "ai.gma"
VERSION = 1

BLOCK = 64
"""Tokens whose affinities are formed explicitly, as in `gma.model.ops.chunked`."""

NAN = float("nan")

ACTIVATIONS = {
    "T0": ("tensor(float)", "tensor(float16)", "tensor(bfloat16)"),
    "F": ("tensor(float)",),
    "I": ("tensor(int64)",),
    "B": ("tensor(bool)",),
}

# name: type, what it is
INPUTS = {
    "routed": ("T0", "(R, C, H * (2r + v)): every head's q, then every k, then every value"),
    "memory": ("F", "(D, H, K, v), the documents' sums of values"),
    "mass": ("F", "(D, H, K), the documents' sums of responsibilities"),
    "linear": ("F", "(H, K, r), the mixture's mu / var"),
    "quadratic": ("F", "(H, K, r), its -1 / (2 var)"),
    "bias": ("F", "(H, K), its constant part of the score"),
    "lengths": ("I", "(R,), tokens of each row; 0: the row is not used"),
    "document_of_row": (
        "I",
        "(R,), 0 to D - 1. Rows of one document stand together, in order, all but its last full",
    ),
    "fresh": ("B", "(D,), whatever the document's state holds, NaN too, counts as zeros"),
    "x": ("T0", "(R, C, W)"),
    "tail": ("F", "(D, T, W), the convolution's last inputs"),
    "scale": ("F", "(W,), weight of the normalisation before the convolution"),
    "taps": ("F", "(T + 1, W), the oldest token's first"),
    "weight": ("T0", "(I, O)"),
    "residual": ("T0", "(..., O), added to the product"),
}
OUTPUTS = {
    "out": ("T0", "(R, C, H * v), 0 where no token is"),
    "memory_after": ("F", "(D, H, K, v)"),
    "mass_after": ("F", "(D, H, K)"),
    "y": ("T0", "like x"),
    "normal": ("T0", "like x, of mean square one"),
    "tail_after": ("F", "(D, T, W)"),
}
# name: type, what it is
ATTRIBUTES = {
    "normalize": ("INT", "1: queries and keys are RMS-normalised before the mixture scores them"),
    "epsilon": ("FLOAT", "added to the mass, or to the mean square, that is divided by"),
    "routing_epsilon": ("FLOAT", "added to the mean square of a query or key"),
    "activation": ("STRING", "of the product: none, or gelu in its tanh form"),
}


@dataclass(frozen=True)
class Operator:
    """One operator: everything about it but its kernels."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[str, ...]
    doc: str
    write: Callable[..., dict[str, Value]] = field(repr=False)
    optional: str = ""
    """The input that may be left out; a body without it is the function of no overload."""

    def schema(self) -> OpSchema:
        used = {INPUTS[name][0] for name in self.inputs}
        return OpSchema(
            self.name,
            DOMAIN,
            VERSION,
            self.doc,
            inputs=[
                OpSchema.FormalParameter(
                    name,
                    *INPUTS[name],
                    param_option=OpSchema.FormalParameterOption.Optional
                    if name == self.optional
                    else OpSchema.FormalParameterOption.Single,
                )
                for name in self.inputs
            ],
            outputs=[OpSchema.FormalParameter(name, *OUTPUTS[name]) for name in self.outputs],
            type_constraints=[
                (letter, list(types), "") for letter, types in ACTIVATIONS.items() if letter in used
            ],
            attributes=[
                OpSchema.Attribute(name, getattr(OpSchema.AttrType, kind), doc, required=True)
                for name, (kind, doc) in ((name, ATTRIBUTES[name]) for name in self.attributes)
            ],
        )

    def overload(self, inputs: int) -> str:
        """Which body a node of so many inputs has."""
        return self.optional if inputs == len(self.inputs) else ""

    def functions(self) -> list[FunctionProto]:
        """Its bodies: one, or with an optional input one for each number of inputs.

        A function can't tell whether an input is there, so the overload named as the optional
        input is the one that has it.
        """
        shorter = [self.inputs[:-1]] if self.optional else []
        return [self._function(inputs) for inputs in [*shorter, self.inputs]]

    def _function(self, inputs: Sequence[str]) -> FunctionProto:
        body = Body()
        return body.function(
            DOMAIN,
            self.name,
            inputs=inputs,
            outputs=self.write(body, *body.inputs(inputs)),
            attributes=self.attributes,
            overload=self.overload(len(inputs)),
            doc=self.doc,
        )


@dataclass(frozen=True)
class Rows:
    """Which rows of a step belong together: `gma.model.ops.chunked.Rows`, as nodes."""

    used: Value  # (R,) bool
    document: Value  # (R,) int64
    earlier: Value  # (R, R) bool: column's row is of the same document, and before
    last: Value  # (D,) int64: the document's last row, -1 if it has none
    index: Value  # (R,) int64: 0, 1, ...

    @classmethod
    def of(cls, op: Body, lengths: Value, document: Value, states: Value) -> Rows:
        """lengths (R,), document_of_row (R,), states (D, ...)."""
        used = lengths > 0
        index = op.Range(0, _scalar(op, lengths, 0), 1)
        same = op.Unsqueeze(document, [1]).equals(document) & used
        earlier = same & op.Unsqueeze(used, [1]) & (index < op.Unsqueeze(index, [1]))
        documents = op.Range(0, _scalar(op, states, 0), 1)
        belongs = op.Unsqueeze(documents, [1]).equals(document) & used
        last = op.ReduceMax(op.Where(belongs, index, -1), [1], keepdims=0)
        return cls(used, document, earlier, last, index)

    def incoming(self, op: Body, states: Value, fresh: Value | None) -> Value:
        """(D, ...) -> (R, ...), the state of each row's document; zeros for a row not used."""
        holds = self.used
        if fresh is not None:
            holds = holds & ~op.Gather(fresh, self.document)
        gathered = op.Gather(states, self.document)
        return op.Where(_spread(op, holds, gathered), gathered, 0.0)

    def after(self, op: Body, of_rows: Value, states: Value, fresh: Value) -> Value:
        """States (D, ...) after the step: a document's last row's of ``of_rows`` (R, ...).

        A document without rows keeps its own, or zeros if it is fresh. States are picked, never
        multiplied: nothing gets from one into another.
        """
        own = op.Where(_spread(op, fresh, states), 0.0, states)
        picked = op.Gather(of_rows, op.Max(self.last, 0))
        has_rows = self.last > -1
        return op.Where(_spread(op, has_rows, states), picked, own)

    def before(self, op: Body, sums: Value) -> Value:
        """Exclusive prefix (R, X) of the rows' own sums (R, X), restarting at each document."""
        # A sum that is not finite would reach every row through 0 * NaN: it is taken out of the
        # product, and makes the rows after it NaN again, which are its document's.
        bad = op.IsNaN(op.ReduceSum(sums * 0.0, [1], keepdims=1))
        earlier = op.Cast(self.earlier, to=TensorProto.FLOAT)
        prefix = earlier @ op.Where(bad, 0.0, sums)
        after_bad = earlier @ op.Cast(bad, to=TensorProto.FLOAT) > 0.0
        return op.Where(after_bad, NAN, prefix)


def _scalar(op: Body, x: Value, axis: int) -> Value:
    """The size of one dimension."""
    return op.Squeeze(_size(op, x, axis))


def _size(op: Body, x: Value, axis: int) -> Value:
    """The size of one dimension, (1,) int64."""
    return op.Shape(x, start=axis, **({"end": axis + 1} if axis != -1 else {}))


def _spread(op: Body, each: Value, like: Value) -> Value:
    """(R,) -> (R, 1, ..., 1), of as many dimensions as ``like``."""
    ones = op.Expand(1, op.Shape(op.Shape(like, start=1)))
    return op.Reshape(each, op.Concat([-1], ones, axis=0))


def _present(op: Body, x: Value, lengths: Value) -> Value:
    """(R, C, 1) bool: the token exists. x (R, C, ...)."""
    return op.Unsqueeze(op.Range(0, _scalar(op, x, 1), 1) < op.Unsqueeze(lengths, [1]), [2])


def _normalized(op: Body, x: Value, epsilon: Value) -> Value:
    """x (..., n) float divided by the root of its mean square."""
    square = op.ReduceMean(x * x, [-1], keepdims=1)
    return x / op.Sqrt(square + epsilon)


def _responsibilities(op: Body, x: Value, linear: Value, quadratic: Value, bias: Value) -> Value:
    """x (..., H, C, r) -> (..., H, C, K): rows are >= 0 and sum to 1."""
    normal = _normalized(op, x, op.attribute("routing_epsilon", "FLOAT"))
    normalize = op.Cast(op.attribute("normalize", "INT"), to=TensorProto.BOOL)
    x = op.Where(normalize, normal, x)
    both = op.Concat(x, x * x, axis=-1)
    weights = op.Transpose(op.Concat(linear, quadratic, axis=-1), perm=[0, 2, 1])
    return op.Softmax(both @ weights + op.Unsqueeze(bias, [1]), axis=-1)


@dataclass(frozen=True)
class Routed:
    """What is projected for the rows' tokens, head by head, in float32; zeros where none is."""

    queries_and_keys: Value  # (2, R, H, C, r)
    values: Value  # (R, H, C, v + 1): the mass is the memory of a value that is always one
    present: Value  # (R, C, 1) bool

    @classmethod
    def of(cls, op: Body, routed: Value, lengths: Value, linear: Value, values: Value) -> Routed:
        """routed (R, C, H * (2r + v)), linear (H, K, r); ``values`` is v, (1,) int64."""
        present = _present(op, routed, lengths)
        wide = op.Where(present, op.Cast(routed, to=TensorProto.FLOAT), 0.0)
        heads, routing = _size(op, linear, 0), _size(op, linear, 2)
        width = heads * routing
        sizes = op.Concat(width * 2, heads * values, axis=0)
        scored, val = op.split(wide, sizes, axis=2)
        scored = op.Reshape(scored, op.Concat([0, 0, 2], heads, routing, axis=0))
        scored = op.Transpose(scored, perm=[2, 0, 3, 1, 4])
        val = op.Reshape(val, op.Concat([0, 0], heads, values, axis=0))
        val = op.Transpose(val, perm=[0, 2, 1, 3])
        ones = op.Expand(1.0, op.Concat(op.Shape(val, end=3), [1], axis=0))
        return cls(scored, op.Concat(val, ones, axis=3), present)

    def keys(self, op: Body, gamma: Value) -> Value:
        """Responsibilities (R, H, C, K) of keys, those of tokens that are not there zero."""
        return gamma * op.Unsqueeze(op.Cast(self.present, to=TensorProto.FLOAT), [1])


def _joined(op: Body, memory: Value, mass: Value) -> Value:
    """(.., K, v) and (.., K) -> (.., K, v + 1)."""
    return op.Concat(memory, op.Unsqueeze(mass, [-1]), axis=-1)


def _parted(op: Body, both: Value, values: Value) -> tuple[Value, Value]:
    """(..., v + 1) -> (..., v) and (..., 1)."""
    return op.split(both, op.Concat(values, [1], axis=0), axis=-1)


def _after(
    op: Body, rows: Rows, both: Value, memory: Value, mass: Value, fresh: Value
) -> dict[str, Value]:
    """The states after the step, of those after each row, (R, H, K, v + 1)."""
    written, written_mass = _parted(op, both, _size(op, memory, -1))
    return {
        "memory_after": rows.after(op, written, memory, fresh),
        "mass_after": rows.after(op, op.Squeeze(written_mass, [-1]), mass, fresh),
    }


def _read(op: Body, summed: Value, values: Value, chunk: Value) -> Value:
    """Sums (R, H, C', v + 1), the last column the mass, -> means (R, C, H * v)."""
    weighted, weight = _parted(op, summed, values)
    means = op.Transpose(weighted / (weight + op.attribute("epsilon", "FLOAT")), perm=[0, 2, 1, 3])
    return op.Slice(op.Reshape(means, [0, 0, -1]), [0], chunk, [1])


def _causal(
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
    rows = Rows.of(op, lengths, document_of_row, memory)
    chunk, values = _size(op, routed, 1), _size(op, memory, -1)
    # A short row is one block. A longer one is filled up with tokens that are not there.
    block = op.Min(chunk, [BLOCK])
    blocks = (chunk + block - 1) / block
    missing = blocks * block - chunk
    wide = op.Cast(routed, to=TensorProto.FLOAT)
    filled = op.Pad(wide, op.Concat([0, 0, 0, 0], missing, [0], axis=0))
    tokens = Routed.of(op, filled, lengths, linear, values)

    def split(x: Value) -> Value:  # (R, H, C', n) -> (R, H, blocks, B, n)
        return op.Reshape(x, op.Concat([0, 0], blocks, block, _size(op, x, -1), axis=0))

    gamma = _responsibilities(op, tokens.queries_and_keys, linear, quadratic, bias)
    gamma_q = split(op.Gather(gamma, 0))
    gamma_k = split(tokens.keys(op, op.Gather(gamma, 1)))
    written = split(tokens.values)
    keys = op.Transpose(gamma_k, perm=[0, 1, 2, 4, 3])

    sums = keys @ written  # (R, H, blocks, K, v + 1)
    of_row = op.ReduceSum(sums, [2], keepdims=0)
    flat = rows.before(op, op.Reshape(of_row, [0, -1]))
    before_row = op.Reshape(flat, op.Shape(of_row)) + _joined(
        op, rows.incoming(op, memory, fresh), rows.incoming(op, mass, fresh)
    )
    # Exclusive: no block reads its own write twice.
    before = op.CumSum(sums, 2, exclusive=1) + op.Unsqueeze(before_row, [2])
    affinity = op.Trilu(gamma_q @ keys, upper=0)
    summed = affinity @ written + gamma_q @ before
    shape = op.Concat([0, 0], blocks * block, _size(op, summed, -1), axis=0)
    out = _read(op, op.Reshape(summed, shape), values, chunk)
    out = op.Where(_present(op, routed, lengths), out, 0.0)
    return {
        "out": op.CastLike(out, routed),
        **_after(op, rows, before_row + of_row, memory, mass, fresh),
    }


def _write(
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
    rows = Rows.of(op, lengths, document_of_row, memory)
    tokens = Routed.of(op, routed, lengths, linear, _size(op, memory, -1))
    k = op.Gather(tokens.queries_and_keys, 1)
    gamma = tokens.keys(op, _responsibilities(op, k, linear, quadratic, bias))
    of_row = op.Transpose(gamma, perm=[0, 1, 3, 2]) @ tokens.values
    before = op.Reshape(rows.before(op, op.Reshape(of_row, [0, -1])), op.Shape(of_row))
    incoming = _joined(op, rows.incoming(op, memory, fresh), rows.incoming(op, mass, fresh))
    return _after(op, rows, incoming + before + of_row, memory, mass, fresh)


def _recall(
    op: Body,
    routed: Value,
    memory: Value,
    mass: Value,
    linear: Value,
    quadratic: Value,
    bias: Value,
    lengths: Value,
    document_of_row: Value,
) -> dict[str, Value]:
    rows = Rows.of(op, lengths, document_of_row, memory)
    values = _size(op, memory, -1)
    tokens = Routed.of(op, routed, lengths, linear, values)
    q = op.Gather(tokens.queries_and_keys, 0)
    gamma = _responsibilities(op, q, linear, quadratic, bias)
    both = _joined(op, rows.incoming(op, memory, None), rows.incoming(op, mass, None))
    out = _read(op, gamma @ both, values, _size(op, routed, 1))
    return {"out": op.CastLike(op.Where(tokens.present, out, 0.0), routed)}


def _convolve(
    op: Body,
    x: Value,
    tail: Value,
    scale: Value,
    taps: Value,
    lengths: Value,
    document_of_row: Value,
    fresh: Value,
) -> dict[str, Value]:
    rows = Rows.of(op, lengths, document_of_row, tail)
    epsilon = op.attribute("epsilon", "FLOAT")
    wide = op.Cast(x, to=TensorProto.FLOAT)
    own = _normalized(op, wide, epsilon) * scale
    reach, chunk = _scalar(op, tail, 1), _scalar(op, x, 1)
    # A row is preceded by its document's previous row, which is full, or by its document's tail.
    ends = op.Slice(own, _size(op, x, 1) - _size(op, tail, 1), _size(op, x, 1), [1])
    previous = op.Gather(ends, op.Max(rows.index - 1, 0))
    count = op.ReduceSum(op.Cast(rows.earlier, to=TensorProto.INT64), [1], keepdims=0)
    before = op.Where(_spread(op, count > 0, own), previous, rows.incoming(op, tail, fresh))
    seen = op.Concat(before, own, axis=1)
    window = op.Unsqueeze(op.Range(0, chunk, 1), [1]) + op.Range(0, reach + 1, 1)
    update = op.ReduceSum(op.Gather(seen, window, axis=1) * taps, [2], keepdims=0)
    y = op.CastLike(wide + update, x)
    normal = _normalized(op, op.Cast(y, to=TensorProto.FLOAT), epsilon)
    # Token t of a row lies at t + T, so the last T of its first n tokens start at n.
    start = rows.index * (reach + chunk) + lengths
    at = op.Unsqueeze(start, [1]) + op.Range(0, reach, 1)
    flat = op.Reshape(seen, op.Concat([-1], _size(op, x, -1), axis=0))
    return {
        "y": y,
        "normal": op.CastLike(normal, x),
        "tail_after": rows.after(op, op.Gather(flat, at), tail, fresh),
    }


def _normalize(op: Body, x: Value) -> dict[str, Value]:
    wide = op.Cast(x, to=TensorProto.FLOAT)
    return {"normal": op.CastLike(_normalized(op, wide, op.attribute("epsilon", "FLOAT")), x)}


def _multiply(op: Body, x: Value, weight: Value, residual: Value | None = None) -> dict[str, Value]:
    product = op.Cast(x, to=TensorProto.FLOAT) @ op.Cast(weight, to=TensorProto.FLOAT)
    y = op.choose(
        op.attribute("activation", "STRING").equals("gelu"),
        lambda branch: branch.Gelu(product, approximate="tanh"),
        lambda branch: branch.Identity(product),
    )
    if residual is not None:
        y = y + op.Cast(residual, to=TensorProto.FLOAT)
    return {"y": op.CastLike(y, x)}


_MIXTURE = ("routed", "memory", "mass", "linear", "quadratic", "bias", "lengths", "document_of_row")

OPERATORS = {
    operator.name: operator
    for operator in (
        Operator(
            "CausalGMA",
            (*_MIXTURE, "fresh"),
            ("out", "memory_after", "mass_after"),
            ("normalize", "epsilon", "routing_epsilon"),
            "Gaussian Mixture Attention: each token's mean over what it and its document's earlier "
            "tokens wrote, in this step and in its state.",
            _causal,
        ),
        Operator(
            "WriteGMA",
            (*_MIXTURE, "fresh"),
            ("memory_after", "mass_after"),
            ("normalize", "routing_epsilon"),
            "The bidirectional form's first half: adds what the rows' keys write to their "
            "documents' states.",
            _write,
        ),
        Operator(
            "ReadGMA",
            _MIXTURE,
            ("out",),
            ("normalize", "epsilon", "routing_epsilon"),
            "The bidirectional form's second half: each token's mean over its document's memory.",
            _recall,
        ),
        Operator(
            "ShortConvolution",
            ("x", "tail", "scale", "taps", "lengths", "document_of_row", "fresh"),
            ("y", "normal", "tail_after"),
            ("epsilon",),
            "y = x + the causal depthwise convolution of the normalised x; normal is y normalised.",
            _convolve,
        ),
        Operator(
            "Normalize",
            ("x",),
            ("normal",),
            ("epsilon",),
            "x divided by the root of its mean square over the last dimension.",
            _normalize,
        ),
        Operator(
            "Linear",
            ("x", "weight", "residual"),
            ("y",),
            ("activation",),
            "activation(x @ weight) + residual, summed in float32.",
            _multiply,
            optional="residual",
        ),
    )
}


def register() -> None:
    """Make the schemas known to onnx, once a process."""
    for operator in OPERATORS.values():
        if not has(operator.name, VERSION, DOMAIN):
            register_schema(operator.schema())


def functions() -> list[FunctionProto]:
    """The bodies of all operators, for a model that may run without kernels of them."""
    return [function for operator in OPERATORS.values() for function in operator.functions()]
