"""The operators' CUDA kernels in ONNX Runtime against the float64 reference.

The library is the one that GMA_OPS_LIBRARY names, or that of the installed package gma_ops.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

import onnxruntime
from onnx import TensorProto

from gma.export.operators import OPERATORS
from tests.export import operating
from tests.export.operating import Array, Rows, hostile
from tests.model.small import error

CUDA = "CUDAExecutionProvider"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or CUDA not in onnxruntime.get_available_providers(),
        reason="no GPU, or no provider for it in ONNX Runtime",
    ),
]

SIZES = [(3, 32, 32, 64), (2, 16, 16, 32)]  # H, K, r, v, as the library is built for
SIZE = {"CausalGMA": SIZES[0], "ForgettingGMA": SIZES[0], "ShortConvolution": 192}
CHUNKS = (1, 63, 64, 65, 130, 1000, 1025)
WIDTHS = (24, 192, 768, 1030)
TORCH: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}
ROUNDING: dict[int, float] = {
    TensorProto.FLOAT: 1e-5,
    TensorProto.FLOAT16: 2e-3,
    TensorProto.BFLOAT16: 1e-2,
}
types = pytest.mark.parametrize("through", ROUNDING, ids=["float", "float16", "bfloat16"])

Run = Callable[..., dict[str, Array]]


@pytest.fixture(scope="module")
def library() -> Path:
    if path := os.environ.get("GMA_OPS_LIBRARY"):
        return Path(path)
    try:
        package: Any = importlib.import_module("gma_ops")
    except ImportError:
        pytest.skip("no library: GMA_OPS_LIBRARY names none, and gma_ops is not installed")
    found: Path = package.library()
    return found


class Operator:
    """A session of one operator on the GPU, none of it elsewhere."""

    def __init__(
        self, library: Path, name: str, inputs: dict[str, Array], through: int, **attributes: object
    ) -> None:
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.register_custom_ops_library(str(library))
        model = operating.model(name, inputs, through=through, **attributes)
        self.session = onnxruntime.InferenceSession(
            model, options, providers=[(CUDA, {"use_tf32": 0})]
        )
        assert self.session.get_providers()[0] == CUDA
        self.outputs = OPERATORS[name].outputs

    def __call__(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return dict(zip(self.outputs, self.session.run(None, inputs), strict=True))


def run(
    library: Path, name: str, inputs: dict[str, Array], rows: Rows, through: int
) -> dict[str, Array]:
    """Run the operator in memory where a step of nothing but NaN was computed before."""
    given = _given(name, inputs, rows)
    operator = Operator(library, name, given, through, **operating.attributes(name))
    # Where it may go: what a kernel leaves unwritten, or reads unwritten, is NaN.
    operator({n: np.full_like(x, np.nan) if x.dtype == np.float32 else x for n, x in given.items()})
    return operator(given)


def _given(name: str, inputs: dict[str, Array], rows: Rows) -> dict[str, Array]:
    every = {**operating.single(inputs), **rows.arrays()}
    return {each: every[each] for each in OPERATORS[name].inputs}


@types
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", operating.MIXERS)
def test_mixture(
    library: Path, name: str, chunk: int, size: tuple[int, int, int, int], through: int
) -> None:
    rows = hostile(chunk)
    inputs = operating.inputs_of(name, rows, size)
    inputs["routed"] = _rounded(inputs["routed"], through)
    expected = operating.reference_of(name, inputs, rows)
    inputs["routed"][~rows.there()] = np.nan
    for state in ("memory", "mass"):
        inputs[state][rows.fresh] = np.nan
    _assert_close(run(library, name, inputs, rows, through), expected, through)


@types
@pytest.mark.parametrize("keep_bias", [-1e4, -16.0, 1e4])
def test_rates_at_their_bounds(library: Path, keep_bias: float, through: int) -> None:
    """All is kept, nearly all, or as little as may be."""
    rows = hostile(1000)
    inputs = operating.forgetting_inputs(rows, SIZES[0], keep_bias=keep_bias)
    inputs["routed"] = _rounded(inputs["routed"], through)
    expected = operating.forgetting_reference(inputs, rows)
    _assert_close(run(library, "ForgettingGMA", inputs, rows, through), expected, through)


@types
@pytest.mark.parametrize("name", operating.MIXERS)
def test_what_a_long_document_wrote_is_read(library: Path, name: str, through: int) -> None:
    rows = Rows(64, [64], [0], 1, [False])
    inputs = operating.inputs_of(name, rows, SIZES[0])
    inputs["routed"] = _rounded(inputs["routed"], through)
    for state in ("memory", "mass"):
        inputs[state] = (torch.tensor(inputs[state]) * 1e6).numpy()
    expected = operating.reference_of(name, inputs, rows)
    _assert_close(run(library, name, inputs, rows, through), expected, through)


@types
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("chunk", [1, 2, 3, 63, 64, 1000])
def test_convolution(library: Path, chunk: int, width: int, through: int) -> None:
    rows = hostile(chunk)
    inputs = operating.convolution_inputs(rows, width)
    inputs["x"] = _rounded(inputs["x"], through)
    expected = operating.convolution_reference(inputs, rows)
    inputs["x"][~rows.there()] = np.nan
    inputs["tail"][rows.fresh] = np.nan
    found = run(library, "ShortConvolution", inputs, rows, through)
    there = rows.there()
    for name in ("y", "normal"):
        found[name] = np.where(there[..., None], found[name], 0.0)
    _assert_close(found, expected, through)


@pytest.mark.parametrize("taps", [2, 3])
def test_fewer_taps(library: Path, taps: int) -> None:
    rows = hostile(65)
    inputs = operating.convolution_inputs(rows, 192)
    inputs["taps"], inputs["tail"] = inputs["taps"][-taps:], inputs["tail"][:, 1 - taps :]
    padded = {
        **inputs,
        "taps": np.pad(inputs["taps"], ((4 - taps, 0), (0, 0))),
        "tail": np.pad(inputs["tail"], ((0, 0), (4 - taps, 0), (0, 0))),
    }
    expected = operating.convolution_reference(padded, rows)
    expected["tail_after"] = expected["tail_after"][:, 1 - taps :]
    found = run(library, "ShortConvolution", inputs, rows, TensorProto.FLOAT)
    for name in ("y", "normal"):
        found[name] = np.where(rows.there()[..., None], found[name], 0.0)
    _assert_close(found, expected, TensorProto.FLOAT)


@types
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["rows", "state"])
@pytest.mark.parametrize("name", operating.STATEFUL)
def test_nothing_crosses_documents(
    library: Path, name: str, where: str, poison: float, through: int
) -> None:
    rows = hostile(65)
    clean = operating.inputs_of(name, rows, SIZE[name])
    poisoned = {each: x.copy() for each, x in clean.items()}
    if where == "rows":
        poisoned[operating.TOKENS[name]][1, 3] = poison  # of document 4
    else:
        for state in operating.STATES[name]:
            poisoned[state][[4, 1]] = poison
    rows.fresh = [False, False, False, False, False, False, True]
    before, after = (run(library, name, inputs, rows, through) for inputs in (clean, poisoned))
    hit = [4, 1] if where == "state" else [4]
    of_row, of_document = ~np.isin(rows.documents, hit), ~np.isin(np.arange(rows.count), hit)
    for output, x in before.items():
        there = rows.there() & of_row[:, None] if output in ("out", "y", "normal") else of_row
        if output.endswith("_after"):
            there = of_document
        np.testing.assert_array_equal(after[output][there], x[there], err_msg=output)
        assert np.isfinite(x[there]).all()


@pytest.mark.parametrize("name", operating.STATEFUL)
def test_hostile_rows_stay_in_their_tensors(library: Path, name: str) -> None:
    rows = hostile(65)
    inputs = operating.inputs_of(name, rows, SIZE[name])
    used = rows.lengths[4]
    rows.lengths = [2**40, -5, 66, 3, used, -(2**63), 2**63 - 1, 0]
    rows.documents = [4, 4, -1, 2**40, 2, 7, -(2**63), 2**62]
    rows.fresh = [False] * 7
    found = run(library, name, inputs, rows, TensorProto.FLOAT)
    # Of row 4, which is as it was, and of documents of which there is nothing.
    rows.lengths, rows.documents = [65, 0, 0, 0, used, 0, 0, 0], [4, 4, 0, 0, 2, 0, 0, 0]
    again = run(library, name, inputs, rows, TensorProto.FLOAT)
    there = rows.there()
    for output, x in again.items():
        kept = there if output in ("out", "y", "normal") else slice(None)
        np.testing.assert_array_equal(found[output][kept], x[kept], err_msg=output)


@types
@pytest.mark.parametrize(
    ("count", "inner", "outer"), [(1, 192, 384), (130, 64, 192), (77, 6, 5), (4096, 768, 2048)]
)
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("residual", [False, True])
def test_linear(
    library: Path,
    residual: bool,
    activation: str,
    count: int,
    inner: int,
    outer: int,
    through: int,
) -> None:
    rng = np.random.default_rng(0)
    inputs = {
        "x": _rounded(rng.normal(size=(count, inner)), through),
        "weight": _rounded(rng.normal(size=(inner, outer)) / inner**0.5, through),
    }
    if residual:
        inputs["residual"] = _rounded(rng.normal(size=(count, outer)), through)
    expected = torch.tensor(inputs["x"]) @ torch.tensor(inputs["weight"])
    if activation == "gelu":
        expected = functional.gelu(expected, approximate="tanh")
    if residual:
        expected = expected + torch.tensor(inputs["residual"])
    given = operating.single(inputs)
    found = Operator(library, "Linear", given, through, activation=activation)(given)
    _assert_close(found, {"y": expected}, through)


@types
@pytest.mark.parametrize("width", WIDTHS)
def test_normalize(library: Path, width: int, through: int) -> None:
    x = _rounded(np.random.default_rng(0).normal(size=(3, 7, width)), through)
    given = operating.single({"x": x})
    found = Operator(library, "Normalize", given, through, epsilon=1e-6)(given)
    normal = functional.rms_norm(torch.tensor(x), (width,), eps=1e-6)
    _assert_close(found, {"normal": normal}, through)


@pytest.mark.parametrize("name", operating.MIXERS)
def test_a_shape_without_kernels_is_refused(library: Path, name: str) -> None:
    rows = hostile(3)
    inputs = operating.inputs_of(name, rows, (2, 5, 3, 4))
    with pytest.raises(Exception, match="GMA_SHAPES"):
        run(library, name, inputs, rows, TensorProto.FLOAT)


@pytest.mark.parametrize(
    ("heads", "width", "message"), [(65, 0, "fewer heads"), (3, -1, "multiple of 16")]
)
def test_what_its_kernels_do_not_take_is_refused(
    library: Path, heads: int, width: int, message: str
) -> None:
    rows = hostile(3)
    inputs = operating.forgetting_inputs(rows, (heads, 16, 16, 32))
    inputs["routed"] = inputs["routed"][..., : width or None]
    with pytest.raises(Exception, match=message):
        run(library, "ForgettingGMA", inputs, rows, TensorProto.FLOAT)


def _rounded(x: Array, through: int) -> Array:
    rounded: Array = torch.tensor(x).to(TORCH[through]).double().numpy()
    return rounded


def _assert_close(found: dict[str, Array], expected: dict[str, Tensor], through: int) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].shape == tuple(x.shape)
        assert error(torch.tensor(found[name]), x) < ROUNDING[through], name
