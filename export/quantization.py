"""Products in int8: matrices are quantised once, by columns; activations in each step, by tokens.

Each token has its own scale, unlike in ONNX Runtime's dynamic quantisation, whose one scale for the
whole step would let an answer depend on the documents that are read beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

LARGEST = 127
"""The largest integer, counted from zero's."""

ZERO = 128
"""The integer that stands for zero, in both. Unsigned times signed may be faster, but processors
without VNNI add two such products in 16 bits, and saturate."""

TINIEST = 1e-30
"""The least scale, by which what is zero everywhere is divided."""

CONSTANTS = {
    "quantized_zero": np.uint8(ZERO),
    "quantized_offset": np.float32(ZERO),
    "quantized_range": np.float32(LARGEST),
    "quantized_least": np.float32(TINIEST),
    "quantized_axis": np.array([-1], np.int64),
}


def quantize(model: onnx.ModelProto) -> None:
    """Replace every float32 product with a matrix of the model, in place."""
    graph = model.graph
    matrices = {x.name: x for x in graph.initializer if x.data_type == TensorProto.FLOAT}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in matrices:
            graph.initializer.extend(_columns(matrices[node.input[1]]))
            graph.initializer.remove(matrices[node.input[1]])
            nodes += _product(node.input[0], node.input[1], node.output[0])
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    constants = CONSTANTS.items()
    graph.initializer.extend(numpy_helper.from_array(np.asarray(x), name) for name, x in constants)


def _columns(matrix: TensorProto) -> list[TensorProto]:
    """Quantise a matrix (I, O): uint8 of the same shape, and the scale of each column, (O,)."""
    weight: NDArray[np.float32] = numpy_helper.to_array(matrix)
    scale = np.maximum(np.abs(weight).max(0) / LARGEST, TINIEST).astype(np.float32)
    rounded = (np.rint(weight / scale) + ZERO).astype(np.uint8)
    return [
        numpy_helper.from_array(rounded, f"{matrix.name}_int8"),
        numpy_helper.from_array(scale, f"{matrix.name}_scale"),
    ]


def _product(x: str, weight: str, output: str) -> list[NodeProto]:
    """Multiply x (..., I), quantised token by token, with the quantised matrix: float32 again."""

    def node(op_type: str, name: str, *inputs: str, **attributes: Any) -> NodeProto:
        return helper.make_node(op_type, inputs, [name], **attributes)

    def of(part: str) -> str:
        return f"{output}_{part}"

    return [
        node("Abs", of("size"), x),
        node("ReduceMax", of("largest"), of("size"), "quantized_axis"),
        node("Div", of("step"), of("largest"), "quantized_range"),
        node("Max", of("scale"), of("step"), "quantized_least"),
        node("Div", of("scaled"), x, of("scale")),
        node("Add", of("shifted"), of("scaled"), "quantized_offset"),
        node("Round", of("rounded"), of("shifted")),
        node("Cast", of("integers"), of("rounded"), to=TensorProto.UINT8),
        node(
            "MatMulInteger",
            of("sums"),
            of("integers"),
            f"{weight}_int8",
            "quantized_zero",
            "quantized_zero",
        ),
        node("Cast", of("wide"), of("sums"), to=TensorProto.FLOAT),
        node("Mul", of("columns"), of("wide"), f"{weight}_scale"),
        node("Mul", output, of("columns"), of("scale")),
    ]
