"""What is refused of a model file, before ONNX Runtime reads it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from gma.export.artifact import Artifact, ArtifactError
from gma.export.operators import DOMAIN
from tests.export.folders import resign, weight_of


def _elsewhere(location: str, **entries: str) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        tensor = weight_of(model, "embedding")
        length = str(len(tensor.raw_data))
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (
            {"location": location, "offset": "0", "length": length} | entries
        ).items():
            tensor.external_data.add(key=key, value=value)

    return change


def _absurd(model: ModelProto) -> None:
    tensor = weight_of(model, "embedding")
    tensor.ClearField("raw_data")
    del tensor.dims[:]
    tensor.dims.extend([2**40, 2**20])


def _cut(model: ModelProto) -> None:
    tensor = weight_of(model, "embedding")
    tensor.raw_data = tensor.raw_data[:-1]


def _more_weights(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(10**4, np.float32), "more"))


def _without_a_weight(model: ModelProto) -> None:
    weight_of(model, "embedding").name = "renamed"


def _domain(model: ModelProto) -> None:
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def _operator(model: ModelProto) -> None:
    model.graph.node[0].op_type = "Loop"


def _own_operator(model: ModelProto) -> None:
    model.graph.node[0].domain, model.graph.node[0].op_type = DOMAIN, "Other"


def _body(model: ModelProto) -> None:
    model.functions[0].node[0].op_type = "ConstantOfShape"


def _function(model: ModelProto) -> None:
    model.functions.add(domain="", name="Add")


def _range(model: ModelProto) -> None:
    node = next(x for x in model.graph.node if x.op_type == "Range")
    model.graph.initializer.append(numpy_helper.from_array(np.array(2**60), "limit"))
    node.input[1] = "limit"


def _constant(model: ModelProto) -> None:
    node = helper.make_node("MatMul", ["embedding", "embedding"], ["large"])
    model.graph.node.insert(0, node)


def _tensor_attribute(model: ModelProto) -> None:
    value = numpy_helper.from_array(np.zeros(3, np.float32))
    model.graph.node[0].attribute.append(helper.make_attribute("value", value))


def _input(model: ModelProto) -> None:
    model.graph.input.pop()


def _shape(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2**50


def _output(model: ModelProto) -> None:
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def _opset(model: ModelProto) -> None:
    model.opset_import[0].version = 23


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_elsewhere("/etc/passwd"), "outside the folder"),
        (_elsewhere("../model.onnx.data"), "outside the folder"),
        (_elsewhere("model.onnx.data"), "outside the folder"),  # which the manifest doesn't name
        (_absurd, r"embedding is float \(1099511627776, 1048576\)"),
        (_cut, "embedding has .* bytes"),
        (_more_weights, "unknown weight more"),
        (_without_a_weight, "no weight embedding"),
        (_domain, r"unknown operator com\.example"),
        (_operator, "unknown operator Loop"),
        (_own_operator, r"unknown operator ai\.gma\.Other"),
        (_body, "definition of .* is not this version's"),
        (_function, "defines an operator Add"),
        (_range, "Range"),
        (_constant, "reads nothing of the step"),
        (_tensor_attribute, "attribute"),
        (_input, "its inputs are"),
        (_shape, "its input tokens is"),
        (_output, "its output row_evidence is"),
        (_opset, "it has the operators"),
    ],
)
def test_refuses_a_model_that_is_another(
    folder: Path, change: Callable[[ModelProto], None], message: str
) -> None:
    model = onnx.load(folder / "model.onnx")
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    resign(folder)
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"length": "99999999"}, "bytes at"),
        ({"length": "-1"}, "bytes at"),
        ({"offset": "99999999"}, "beyond the end"),
        ({"location": "/dev/zero"}, "outside the folder"),
        ({"location": "link"}, "outside the folder"),
    ],
    ids=str,
)
def test_refuses_weights_elsewhere(
    apart: Path, tmp_path: Path, entries: dict[str, str], message: str
) -> None:
    folder = Path(shutil.copytree(apart, tmp_path / "model"))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for entry in weight_of(model, "embedding").external_data:
        entry.value = entries.get(entry.key, entry.value)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    resign(folder)
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(folder)
