"""The library's kernels against the operators' bodies and the float64 reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument, RuntimeException
from torch import Tensor
from torch.nn import functional

from gma.export.operators import OPERATORS
from tests.export import operating
from tests.export.operating import Array, Rows, hostile
from tests.model.small import error

CHUNKS = (1, 31, 32, 33, 63, 1000)  # around a block of 32 tokens; several segments of 256
SIZES = {"odd": (2, 5, 3, 4), "round": (2, 32, 16, 48)}
ROUNDING: dict[int, float] = {
    TensorProto.FLOAT: 1e-5,
    TensorProto.FLOAT16: 1e-3,
    TensorProto.BFLOAT16: 8e-3,
}
TYPES = list(ROUNDING)
TORCH: dict[int, torch.dtype] = {
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", operating.MIXERS)
def test_mixture(library: Path, name: str, chunk: int, size: str) -> None:
    rows = hostile(chunk)
    inputs = operating.inputs_of(name, rows, SIZES[size])
    expected = operating.reference_of(name, inputs, rows)
    inputs["routed"][~rows.there()] = np.nan
    for state in ("memory", "mass"):
        inputs[state][rows.fresh] = np.nan
    found = _run(name, inputs, rows, library)
    assert found.keys() == expected.keys()
    _assert_close(found, expected)


@pytest.mark.parametrize("through", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
@pytest.mark.parametrize("name", operating.MIXERS)
def test_mixture_in_half_precision(library: Path, name: str, through: int) -> None:
    rows = hostile(65)
    inputs = operating.inputs_of(name, rows, SIZES["round"])
    inputs["routed"] = _rounded(inputs["routed"], through)
    found = _run(name, inputs, rows, library, through=through)
    _assert_close(found, operating.reference_of(name, inputs, rows), through)


@pytest.mark.parametrize("keep_bias", [-1e4, -16.0, 1e4])
def test_rates_at_their_bounds(library: Path, keep_bias: float) -> None:
    """All is kept, nearly all, or as little as may be."""
    rows = hostile(1000)
    inputs = operating.forgetting_inputs(rows, SIZES["round"], keep_bias=keep_bias)
    expected = operating.forgetting_reference(inputs, rows)
    _assert_close(_run("ForgettingGMA", inputs, rows, library), expected)


def test_what_is_forgotten_underflows(library: Path) -> None:
    """A component that nothing is written to any more."""
    rows = Rows(1000, [1000] * 3, [0] * 3, 1, [False])
    inputs = operating.forgetting_inputs(rows, SIZES["round"], keep_bias=1e4)
    inputs["bias"][:, 0] = -1e3
    found = _run("ForgettingGMA", inputs, rows, library)
    _assert_close(found, operating.forgetting_reference(inputs, rows))
    assert found["mass_after"][0, 1, 0] == 0.0


@pytest.mark.parametrize("through", TYPES)
@pytest.mark.parametrize(("chunk", "width"), [(3, 6), (63, 64), (64, 6), (300, 64)])
def test_convolution(library: Path, chunk: int, width: int, through: int) -> None:
    rows = hostile(chunk)
    inputs = operating.convolution_inputs(rows, width)
    inputs["x"] = _rounded(inputs["x"], through)
    expected = operating.convolution_reference(inputs, rows)
    inputs["x"][~rows.there()] = np.nan
    inputs["tail"][rows.fresh] = np.nan
    found = _run("ShortConvolution", inputs, rows, library, through=through)
    _assert_close(found, expected, through)
    normal = functional.rms_norm(torch.tensor(found["y"]).double(), (width,), eps=1e-6)
    _assert_close({"normal": found["normal"]}, {"normal": normal}, through)


def test_a_chunk_shorter_than_the_tail(library: Path) -> None:
    whole = Rows(8, [8], [0], 1, [False])
    inputs = operating.convolution_inputs(whole)
    expected = operating.convolution_reference(inputs, whole)
    inputs["x"] = inputs["x"].reshape(4, 2, -1)
    found = _run("ShortConvolution", inputs, Rows(2, [2] * 4, [0] * 4, 1, [False]), library)
    found = {n: x.reshape(expected[n].shape) for n, x in found.items()}
    _assert_close(found, expected)


@pytest.mark.parametrize("through", TYPES)
@pytest.mark.parametrize("shape", [(6,), (3, 7, 6), (2, 65, 64)])
def test_normalize(library: Path, shape: tuple[int, ...], through: int) -> None:
    x = _rounded(np.random.default_rng(0).normal(size=shape), through)
    found = operating.run(
        "Normalize", operating.single({"x": x}), library, through=through, epsilon=1e-6
    )
    normal = functional.rms_norm(torch.tensor(x), shape[-1:], eps=1e-6)
    _assert_close(found, {"normal": normal}, through)


@pytest.mark.parametrize("through", TYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("shape", [(5, 6, 7), (300, 40, 130)])
def test_linear(
    library: Path, shape: tuple[int, int, int], activation: str, residual: bool, through: int
) -> None:
    rows, width, outputs = shape
    rng = np.random.default_rng(0)
    inputs: dict[str, Array] = {
        "x": rng.normal(size=(2, rows, width)),
        "weight": rng.normal(size=(width, outputs)),
    }
    if residual:
        inputs["residual"] = rng.normal(size=(2, rows, outputs))
    inputs = {name: _rounded(x, through) for name, x in inputs.items()}
    expected = torch.tensor(inputs["x"] @ inputs["weight"])
    if activation == "gelu":
        expected = functional.gelu(expected, approximate="tanh")
    if residual:
        expected = expected + torch.tensor(inputs["residual"])
    given = operating.single(inputs)
    found = operating.run("Linear", given, library, through=through, activation=activation)
    _assert_close(found, {"y": expected}, through)


@pytest.mark.parametrize("where", ["rows", "state"])
@pytest.mark.parametrize("name", operating.STATEFUL)
def test_nothing_crosses_documents(library: Path, name: str, where: str) -> None:
    rows = hostile(65)
    inputs = operating.inputs_of(name, rows)
    clean = _run(name, inputs, rows, library)
    if where == "rows":
        inputs[operating.TOKENS[name]][1, 3] = np.nan  # of document 4
    else:
        for state in operating.STATES[name]:
            inputs[state][4] = np.nan
    found = _run(name, inputs, rows, library)
    other = {True: np.arange(rows.count) != 4, False: np.array(rows.documents) != 4}
    for output, x in clean.items():
        those = other[output.endswith("_after")]
        np.testing.assert_array_equal(found[output][those], x[those], err_msg=output)
        assert np.isfinite(x[those]).all()
        if output in ("out", "y", "memory_after") or (output, where) == ("usage", "rows"):
            assert np.isnan(found[output][~those]).any(), f"{output} hides it"


@pytest.mark.parametrize("name", operating.STATEFUL)
def test_threads_change_nothing(library: Path, name: str) -> None:
    rows = Rows(1001, [1001, 1001, 7, 1000], [1, 1, 1, 0], 2, [False, True])
    inputs = operating.inputs_of(name, rows)
    alone, together = (_run(name, inputs, rows, library, threads=n) for n in (1, 2))
    for output, x in alone.items():
        np.testing.assert_array_equal(together[output], x)


@pytest.mark.parametrize("name", operating.MIXERS)
def test_state_does_not_drift(library: Path, name: str) -> None:
    """Over 262,144 tokens, in one step or in many: a token-by-token float32 sum drifts 2e-4."""
    rows = Rows(4096, [4096] * 64, [0] * 64, 1, [True])
    inputs = operating.inputs_of(name, rows, (2, 4, 2, 3))
    inputs["routed"][..., 8:14] += 1.0  # values, so that sums grow as the masses do
    if name == "ForgettingGMA":
        inputs["keep_bias"][:] = -12.0  # a half-life of about 100,000 tokens
    expected = operating.reference_of(name, inputs, rows)
    for steps in (1, 16):
        state: dict[str, Array] = {}
        for part in np.split(inputs["routed"], steps):
            before = {n.removesuffix("_after"): x for n, x in state.items()}
            found = _run(
                name,
                {**inputs, "routed": part, **before},
                Rows(4096, [4096] * len(part), [0] * len(part), 1, [not state]),
                library,
            )
            state = {n: x for n, x in found.items() if n.endswith("_after")}
        for output, x in state.items():
            assert error(torch.tensor(x), expected[output]) < 1e-6, (output, steps)


@pytest.mark.parametrize("name", operating.MIXERS)
def test_a_long_document_is_cut_into_parts(library: Path, name: str) -> None:
    rows = Rows(2000, [2000] * 7 + [77], [0] * 8, 1, [False])
    inputs = operating.inputs_of(name, rows, (1, 4, 2, 3))
    expected = operating.reference_of(name, inputs, rows)
    _assert_close(_run(name, inputs, rows, library), expected)


@pytest.mark.parametrize("name", operating.STATEFUL)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lengths": [-1, 4, 4]}, "a length is not within"),
        ({"lengths": [9, 4, 4]}, "a length is not within"),
        ({"lengths": [2**62, 4, 4]}, "a length is not within"),
        ({"document_of_row": [0, 1, 3]}, "names no document"),
        ({"document_of_row": [-1, 1, 2]}, "names no document"),
        ({"document_of_row": [0, 1, 0]}, "do not stand together"),
        ({"document_of_row": [0, 0, 1], "lengths": [7, 8, 8]}, "is not full"),
    ],
)
def test_rows_that_make_no_sense_are_refused(
    library: Path, name: str, wrong: dict[str, list[int]], message: str
) -> None:
    rows = Rows(8, [8, 8, 8], [0, 1, 2], 3, [False] * 3)
    inputs = operating.inputs_of(name, rows)
    arrays: dict[str, Array] = {each: np.array(x, np.int64) for each, x in wrong.items()}
    with pytest.raises(InvalidArgument, match=f"{name}: .*{message}"):
        _run(name, inputs, rows, library, more=arrays)


@pytest.mark.parametrize("name", operating.STATEFUL)
def test_shapes_that_do_not_fit_are_refused(library: Path, name: str) -> None:
    rows = Rows(8, [8, 8, 8], [0, 1, 2], 3, [False] * 3)
    inputs = operating.inputs_of(name, rows)
    given = {**operating.single(inputs), **rows.arrays()}
    for wrong in OPERATORS[name].inputs:
        shape = list(given[wrong].shape)
        # What routed has too much of is passed over; how many heads forget is for keep_bias to say.
        shape[-1] += {"routed": -12, "keep_bias": 2}.get(wrong, 1)
        more: dict[str, Array] = {wrong: np.zeros(shape, given[wrong].dtype)}
        with pytest.raises(InvalidArgument, match=f"{name}: "):
            _run(name, inputs, rows, library, more=more)


def test_linear_refuses_shapes_that_do_not_fit(library: Path) -> None:
    x, weight = np.zeros((3, 4), np.float32), np.zeros((5, 6), np.float32)
    with pytest.raises(InvalidArgument, match=r"Linear: weight is \(4, 6\), not \(5, 6\)"):
        operating.run("Linear", {"x": x, "weight": weight}, library, activation="none")


@pytest.mark.parametrize("most", [-0.1, 0.3, np.nan])
def test_a_largest_rate_that_blocks_do_not_hold_is_refused(library: Path, most: float) -> None:
    rows = Rows(8, [8], [0], 1, [False])
    given = {**operating.single(operating.forgetting_inputs(rows)), **rows.arrays()}
    attributes = operating.attributes("ForgettingGMA") | {"most_forgotten": most}
    with pytest.raises(RuntimeException, match="ForgettingGMA: most_forgotten must be from 0"):
        operating.run("ForgettingGMA", given, library, **attributes)


@pytest.mark.parametrize("name", operating.MIXERS)
def test_nothing_to_do(library: Path, name: str) -> None:
    rows = Rows(8, [0, 0], [0, 1], 2, [True, False])
    inputs = operating.inputs_of(name, rows)
    found = _run(name, inputs, rows, library)
    assert not found["out"].any()
    assert not found.get("usage", np.zeros(1)).any()
    assert not found["memory_after"][0].any()
    np.testing.assert_array_equal(found["memory_after"][1], inputs["memory"][1].astype(np.float32))


@pytest.mark.parametrize(
    ("instructions", "needs"),
    [pytest.param("baseline", "fpu", marks=pytest.mark.long), ("avx2", "avx2 fma")],
)
def test_other_instructions(library: Path, instructions: str, needs: str) -> None:
    """What a lesser processor would run, in a process that is told to."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    if not set(needs.split()) <= set(cpuinfo.split()):
        pytest.skip(f"this processor has no {needs}")
    tests = "test_mixture or test_linear"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", tests],
        env={**os.environ, "GMA_OPS_INSTRUCTIONS": instructions},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_unknown_instructions_stop_the_start(library: Path) -> None:
    code = (
        "import sys, onnxruntime as o; o.SessionOptions().register_custom_ops_library(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)],
        env={**os.environ, "GMA_OPS_INSTRUCTIONS": "abacus"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "GMA_OPS_INSTRUCTIONS=abacus" in done.stderr


def _run(
    name: str,
    inputs: dict[str, Array],
    rows: Rows,
    library: Path | None = None,
    *,
    more: dict[str, Array] | None = None,
    through: int = TensorProto.FLOAT,
    threads: int = 1,
) -> dict[str, Array]:
    given = {**operating.single(inputs), **rows.arrays(), **(more or {})}
    wanted = {each: given[each] for each in OPERATORS[name].inputs}
    return operating.run(
        name, wanted, library, through=through, threads=threads, **operating.attributes(name)
    )


def _rounded(x: Array, through: int) -> Array:
    """The float64 numbers that the type holds."""
    rounded: Array = torch.tensor(x).to(TORCH.get(through, torch.float32)).double().numpy()
    return rounded


def _assert_close(
    found: dict[str, Array], expected: dict[str, Tensor], through: int = TensorProto.FLOAT
) -> None:
    """States are float32 whatever the activations are."""
    for name, x in expected.items():
        assert found[name].shape == tuple(x.shape)
        state = name.endswith("_after")
        tolerance = ROUNDING[TensorProto.FLOAT if state else through]
        assert error(torch.tensor(found[name]), x) < tolerance, name
