"""What a model file from anywhere must be before ONNX Runtime reads it.

What is accepted is what `gma.export.step` makes of a configuration, and nothing beside it: its
inputs and outputs, weights of the shapes that the configuration says, known operators with bodies
that are ours. Nothing larger than the file itself is allocated to find that out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.external_data_helper import uses_external_data
from onnx.helper import tensor_dtype_to_np_dtype

from gma.export.body import OPSET
from gma.export.operators import DOMAIN, OPERATORS, VERSION, functions
from gma.export.precision import Precision
from gma.model.config import LASTING, ModelConfig

LARGEST_FILE = 2 * 1024**3 - 1
"""Bytes of a model, at most, for it is a protocol buffer; weights apart from it don't count."""

LARGEST_STATE = 1024**3
"""Bytes of a document's state, at most."""

STANDARD = frozenset(
    """Abs Add And Cast Concat Div Equal Exp Gather Gelu Greater Identity IsInf IsNaN Less Log
    MatMul MatMulInteger Max Mul Neg Not Or Range ReduceMax ReduceMin ReduceSum Relu Reshape Round
    Shape Slice Softplus Squeeze Sub Unsqueeze Where""".split()  # noqa: SIM905 - words, not fifty lines
)
"""The standard operators of a step. None has a graph of its own, and none makes much of little but
Range, which may count documents only."""

PLAIN = {
    AttributeProto.INT,
    AttributeProto.INTS,
    AttributeProto.FLOAT,
    AttributeProto.FLOATS,
    AttributeProto.STRING,
}

FLOAT, DOUBLE, UINT8 = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.UINT8
TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
"""The type of activations and matrices in a precision, where it is not float32."""

ALIGNED = 16
"""What the numbers that are projected of a token with gates are filled up to a multiple of."""

Shape = tuple[int | str, ...]
Tensors = dict[str, tuple[int, Shape]]


def inputs(config: ModelConfig, chunk: int) -> Tensors:
    """List the inputs of a step of R rows and D documents: type and shape by name, in order."""
    layers, heads, components = config.layers, config.heads, config.num_components
    return {
        "tokens": (TensorProto.INT32, ("R", chunk)),
        "lengths": (TensorProto.INT64, ("R",)),
        "document_of_row": (TensorProto.INT64, ("R",)),
        "fresh": (TensorProto.BOOL, ("D",)),
        "memory": (FLOAT, ("D", layers, heads, components, config.value_dim)),
        "mass": (FLOAT, ("D", layers, heads, components)),
        "tail": (FLOAT, ("D", layers, config.tail, config.width)),
        "evidence": (DOUBLE, ("D", len(config.labels))),
        "weight": (DOUBLE, ("D",)),
    }


def outputs(config: ModelConfig) -> Tensors:
    """List the outputs of a step: type and shape by name, in order."""
    labels = len(config.labels)
    usage: Tensors = {"usage": (FLOAT, ("R", config.layers, config.heads, config.num_components))}
    states = [item for item in inputs(config, 0).items() if item[1][1][0] == "D"][1:]
    return {
        "row_evidence": (FLOAT, ("R", labels)),
        "logits": (DOUBLE, ("D", labels)),
        **{f"{name}_after": tensor for name, tensor in states},
        **(usage if config.form == "forgetting" else {}),
    }


def weights(config: ModelConfig, precision: Precision) -> Tensors:
    """List the weights as `gma.export.step` names them: type and shape by name."""
    width, hidden, labels = config.width, config.mlp_width, len(config.labels)
    readings = labels if config.pooling == "any" else labels + 1
    mixture = config.heads, config.num_components, config.routing_dim
    values = config.heads * config.value_dim
    routed = 2 * config.heads * config.routing_dim + values
    others = {"linear": mixture, "quadratic": mixture, "bias": mixture[:2]}
    if config.form == "forgetting":
        forgetting = max(config.heads - LASTING, 0)
        routed += values + forgetting
        routed += -routed % ALIGNED
        others["keep_bias"] = (forgetting,)
    products = {
        "project": (width, routed),
        "out": (values, width),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    if config.tail:
        others |= {"scale": (width,), "taps": (config.conv_kernel, width)}

    matrices = {f"layers.{i}.{n}": x for i in range(config.layers) for n, x in products.items()}
    vectors = {f"layers.{i}.{n}": x for i in range(config.layers) for n, x in others.items()}
    of_type = TYPES.get(precision, FLOAT)
    expected: Tensors = {
        **{name: (FLOAT, shape) for name, shape in vectors.items()},
        "embedding": (of_type, (config.vocab_size, width)),
        "token": (FLOAT, (config.vocab_size, labels)),
        "deep_bias": (FLOAT, (readings,)),
    }
    if config.pooling == "any":
        expected["factor"] = FLOAT, (labels,)
    deep = {"deep": (width, readings)}
    if precision != "int8":
        expected |= {name: (of_type, shape) for name, shape in matrices.items()}
        return expected | {name: (FLOAT, shape) for name, shape in deep.items()}
    for name, shape in (matrices | deep).items():
        expected[f"{name}_int8"] = UINT8, shape
        expected[f"{name}_scale"] = FLOAT, shape[1:]
    return expected


def inspect(
    file: Path, external: Path | None, config: ModelConfig, chunk: int, precision: Precision
) -> None:
    """Check that ``file`` is a step of this configuration.

    ``external`` is the one other file that weights may lie in. Raises ValueError that says what is
    wrong.
    """
    state = sum(
        math.prod(size for size in shape if isinstance(size, int))
        * tensor_dtype_to_np_dtype(kind).itemsize
        for name, (kind, shape) in inputs(config, chunk).items()
        if shape[0] == "D"
    )
    if state > LARGEST_STATE:
        raise ValueError(f"a document's state would take {state} bytes")
    if file.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{file.name} has more than {LARGEST_FILE} bytes")
    try:
        model = onnx.load_model(file, load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{file.name} is not an ONNX model: {error}") from error
    problems = _problems(model, external, config, chunk, precision)
    if wrong := [problem for _, problem in zip(range(8), problems, strict=False)]:
        raise ValueError(f"{file.name}: " + "; ".join(wrong))


def _problems(
    model: ModelProto, external: Path | None, config: ModelConfig, chunk: int, precision: Precision
) -> Iterator[str]:
    versions = {each.domain: each.version for each in model.opset_import}
    if versions != {"": OPSET, DOMAIN: VERSION}:
        yield f"it has the operators {versions}, not { ({'': OPSET, DOMAIN: VERSION}) }"
    if model.training_info or model.graph.sparse_initializer:
        yield "it has parts for training, or sparse ones"
    yield from _wrong_functions(model)
    yield from _wrong_values("input", model.graph.input, inputs(config, chunk))
    yield from _wrong_values("output", model.graph.output, outputs(config))
    # What is no weight is an index or a bound, of which the longest counts a row's tokens.
    few = max(chunk, 64)
    yield from _wrong_weights(model.graph, external, weights(config, precision), few)
    yield from _wrong_nodes(model.graph)


def _wrong_functions(model: ModelProto) -> Iterator[str]:
    ours = {(x.domain, x.name, x.overload): _bytes(x) for x in functions()}
    for function in model.functions:
        key = function.domain, function.name, function.overload
        name = _operator(function.domain, function.name)
        if key not in ours:
            yield f"it defines an operator {name}"
        elif _bytes(function) != ours[key]:
            yield f"its definition of {name} is not this version's: export it again"


def _wrong_values(kind: str, found: Iterable[ValueInfoProto], expected: Tensors) -> Iterator[str]:
    found = list(found)
    names = [value.name for value in found]
    if names != list(expected):
        yield f"its {kind}s are {', '.join(names)[:200]}, not {', '.join(expected)}"
        return
    for value in found:
        tensor = value.type.tensor_type
        shape = tuple(size.dim_param or size.dim_value for size in tensor.shape.dim)
        if (tensor.elem_type, shape) != expected[value.name]:
            was = _tensor(tensor.elem_type, shape)
            yield f"its {kind} {value.name} is {was}, not {_tensor(*expected[value.name])}"


def _wrong_weights(
    graph: GraphProto, external: Path | None, expected: Tensors, few: int
) -> Iterator[str]:
    names = [tensor.name for tensor in graph.initializer]
    if len(set(names)) != len(names):
        yield "it has several weights of one name"
    yield from (f"it has no weight {name}" for name in sorted(expected.keys() - set(names)))
    for tensor in graph.initializer:
        shape = tuple(tensor.dims)
        if tensor.name in expected:
            if (tensor.data_type, shape) != expected[tensor.name]:
                was = _tensor(tensor.data_type, shape)
                yield f"weight {tensor.name} is {was}, not {_tensor(*expected[tensor.name])}"
                continue
        elif any(size < 0 for size in shape) or math.prod(shape) > few:
            yield f"unknown weight {tensor.name} of shape {shape}"
            continue
        yield from _wrong_place(tensor, external)


def _wrong_place(tensor: TensorProto, external: Path | None) -> Iterator[str]:
    """Weights lie in the model, or in the one file beside it, and have the bytes of their shape."""
    try:
        needed = math.prod(tensor.dims) * tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError):
        yield f"weight {tensor.name} has an unknown type"
        return
    if not uses_external_data(tensor):
        if len(tensor.raw_data) != needed:
            yield f"weight {tensor.name} has {len(tensor.raw_data)} bytes, not {needed}"
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if external is None or PurePath(location) != PurePath(external.name):
        yield f"weight {tensor.name} lies outside the folder's own files, at {location[:200]!r}"
        return
    offset, length = entries.get("offset", "0"), entries.get("length", "")
    if not (offset.isdecimal() and length.isdecimal()) or int(length) != needed:
        yield f"weight {tensor.name} has {length[:20]!r} bytes at {offset[:20]!r}, not {needed}"
    elif int(offset) + int(length) > external.stat().st_size:
        yield f"weight {tensor.name} lies beyond the end of {external.name}"


def _wrong_nodes(graph: GraphProto) -> Iterator[str]:
    producers = {name: node for node in graph.node for name in node.output}
    fed = {value.name for value in graph.input}  # what depends on the inputs
    for node in graph.node:
        known = OPERATORS if node.domain == DOMAIN else STANDARD if node.domain == "" else ()
        name = _operator(node.domain, node.op_type)
        if node.op_type not in known:
            yield f"it has an unknown operator {name}"
        elif any(attribute.type not in PLAIN for attribute in node.attribute):
            yield f"a node of {name} has an attribute that is no number and no word"
        elif not fed.intersection(node.input):
            yield f"a node of {name} reads nothing of the step"
        elif node.op_type == "Range" and not _is_size(node.input[1], producers):
            yield "a node of Range counts something else than the documents"
        fed.update(node.output)


def _is_size(name: str, producers: dict[str, NodeProto]) -> bool:
    """Tell whether a tensor is the size of another, and no number that may be anything."""
    while (node := producers.get(name)) is not None and node.op_type in ("Squeeze", "Cast"):
        name = node.input[0]
    return node is not None and node.op_type == "Shape"


def _bytes(function: onnx.FunctionProto) -> bytes:
    content: bytes = function.SerializeToString(deterministic=True)
    return content


def _operator(domain: str, name: str) -> str:
    return f"{domain[:50]}.{name[:50]}".lstrip(".")


def _tensor(kind: int, shape: Shape) -> str:
    try:
        name = TensorProto.DataType.Name(kind).lower()
    except ValueError:
        name = f"type {kind}"
    return f"{name} ({', '.join(map(str, shape[:8]))})"
