"""The step of a classifier as an ONNX model, traced by torch."""

from __future__ import annotations

import onnx
import torch

from gma.export.body import OPSET
from gma.export.inspection import outputs
from gma.export.operators import DOMAIN, OPERATORS, functions, register
from gma.export.placeholders import translations
from gma.export.step import Inputs, PreparedStep
from gma.model.classifier import Classifier
from gma.model.state import State

EXAMPLE = 2, 3
"""Rows and documents that are traced; both are dynamic."""


def trace(classifier: Classifier, dtype: torch.dtype, chunk: int) -> onnx.ModelProto:
    """Trace the step of a causal classifier, best in float64, with its operators' bodies.

    Its rows have ``chunk`` tokens, its activations and matrices are in ``dtype``.
    """
    register()
    rows, documents = EXAMPLE
    states = [x for _, x in State.zeros(classifier.config, documents).tensors()]
    example = Inputs(
        torch.zeros(rows, chunk, dtype=torch.int32),
        torch.zeros(rows, dtype=torch.int64),
        torch.zeros(rows, dtype=torch.int64),
        torch.zeros(documents, dtype=torch.bool),
        *states,
    )
    of_rows, of_documents = {0: torch.export.Dim("R")}, {0: torch.export.Dim("D")}
    step = PreparedStep(classifier, dtype).eval()
    weights = {name: x.detach().clone() for name, x in step.named_parameters()}
    # The exporter makes one weight of two that are equal, as norms' are before any training, and
    # those that are empty.
    for number, x in enumerate(step.parameters()):
        x.data = torch.full(x.shape if x.numel() else (1,), number, dtype=x.dtype)
    program = torch.onnx.export(
        step,
        tuple(example),
        dynamo=True,
        opset_version=OPSET,
        custom_translation_table=translations(),
        input_names=Inputs._fields,
        output_names=list(outputs(classifier.config)),
        dynamic_shapes=(*[of_rows] * 3, *[of_documents] * (len(example) - 3)),
        verbose=False,
    )
    assert program is not None
    model = _finished(program.model_proto)
    for initializer in model.graph.initializer:
        if initializer.name in weights:
            _fill(initializer, weights[initializer.name])
    return model


def _fill(initializer: onnx.TensorProto, x: torch.Tensor) -> None:
    initializer.dims[:] = x.shape
    initializer.raw_data = x.contiguous().view(torch.uint8).numpy().tobytes()


def _finished(model: onnx.ModelProto) -> onnx.ModelProto:
    """Add the bodies of the model's operators, and remove what tells of its making."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    del graph.value_info[:]
    model.producer_name, model.producer_version = "gma", ""
    for node in graph.node:
        if node.domain == DOMAIN:
            node.overload = OPERATORS[node.op_type].overload(len(node.input))
    used = {(node.op_type, node.overload) for node in graph.node if node.domain == DOMAIN}
    model.functions.extend(x for x in functions() if (x.name, x.overload) in used)
    return model
