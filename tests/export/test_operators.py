"""The operators' bodies against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from gma.export.operators import OPERATORS, functions, register
from tests.export import operating
from tests.export.operating import Rows, hostile
from tests.model.small import error

TOLERANCE = 1e-5
CHUNKS = (1, 63, 64, 65, 130, 1000)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", operating.MIXERS)
def test_mixture_is_the_reference(name: str, chunk: int) -> None:
    rows = hostile(chunk)
    inputs = operating.inputs_of(name, rows)
    found = _run(name, inputs, rows)
    _assert_close(found, operating.reference_of(name, inputs, rows))


@pytest.mark.parametrize("keep_bias", [-1e4, -16.0, 1e4])
def test_rates_at_their_bounds(keep_bias: float) -> None:
    """All is kept, nearly all, or as little as may be."""
    rows = hostile(1000)
    inputs = operating.forgetting_inputs(rows, keep_bias=keep_bias)
    found = _run("ForgettingGMA", inputs, rows)
    _assert_close(found, operating.forgetting_reference(inputs, rows))


@pytest.mark.parametrize("chunk", [operating.T, *CHUNKS[1:]])
def test_convolution_is_the_reference(chunk: int) -> None:
    rows = hostile(chunk)
    inputs = operating.convolution_inputs(rows)
    found = _run("ShortConvolution", inputs, rows)
    there = rows.there()[..., None]
    for name in ("y", "normal"):
        found[name] = np.where(there, found[name], 0.0)
    _assert_close(found, operating.convolution_reference(inputs, rows))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["rows", "state", "padding", "fresh"])
@pytest.mark.parametrize("name", operating.STATEFUL)
def test_nothing_crosses_documents(name: str, where: str, poison: float) -> None:
    rows = hostile(65)
    clean = operating.inputs_of(name, rows)
    poisoned = {each: x.copy() for each, x in clean.items()}
    tokens = operating.TOKENS[name]
    if where == "rows":
        poisoned[tokens][1, 3] = poison  # of document 4
    elif where == "padding":
        poisoned[tokens][~rows.there()] = poison
    else:
        for state in operating.STATES[name]:
            poisoned[state][[1, 6] if where == "fresh" else [4, 1]] = poison
    rows.fresh = [False, where == "fresh", False, False, False, False, True]

    before, after = (_run(name, inputs, rows) for inputs in (clean, poisoned))
    hit = {4, 1} if where == "state" else {4} if where == "rows" else set()
    of_row = ~np.isin(rows.documents, list(hit))
    of_document = ~np.isin(np.arange(rows.count), list(hit))
    for output, x in before.items():
        there = rows.there() & of_row[:, None] if output in ("out", "y", "normal") else of_row
        if output.endswith("_after"):
            there = of_document
        np.testing.assert_array_equal(after[output][there], x[there], err_msg=output)
        assert np.isfinite(x[there]).all()
    if where == "rows" and name in operating.MIXERS:
        assert not np.isfinite(after["memory_after"][4]).all()
        assert np.isnan(after["out"][2, 0]).any(), "the document's later rows hide it"


def test_nothing_is_where_no_token_is() -> None:
    rows = hostile(65)
    inputs = operating.mixture_inputs(rows)
    inputs["routed"][~rows.there()] = np.nan
    assert not _run("CausalGMA", inputs, rows)["out"][~rows.there()].any()


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("residual", [False, True])
def test_linear(activation: str, residual: bool) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(3, 7, 6)), rng.normal(size=(6, 5))
    inputs: dict[str, operating.Array] = {"x": x, "weight": weight}
    expected = torch.tensor(x @ weight)
    if activation == "gelu":
        expected = functional.gelu(expected, approximate="tanh")
    if residual:
        inputs["residual"] = rng.normal(size=(3, 7, 5))
        expected = expected + torch.tensor(inputs["residual"])
    found = operating.run("Linear", operating.single(inputs), activation=activation)
    _assert_close(found, {"y": expected})


def test_normalize() -> None:
    x = np.random.default_rng(0).normal(size=(3, 7, 6))
    found = operating.run("Normalize", operating.single({"x": x}), epsilon=1e-6)
    _assert_close(found, {"normal": functional.rms_norm(torch.tensor(x), (6,), eps=1e-6)})


def test_half_activations_are_summed_in_float32() -> None:
    rows = hostile(65)
    inputs = operating.single(operating.mixture_inputs(rows))
    inputs["routed"] = inputs["routed"].astype(np.float16)
    found = _run("CausalGMA", inputs, rows, cast=False)
    assert found["out"].dtype == np.float16
    wide: dict[str, operating.Array] = {name: x.astype(np.float64) for name, x in inputs.items()}
    expected = operating.mixture_reference(wide, rows)
    assert error(torch.tensor(found.pop("out")), expected.pop("out")) < 1e-3
    _assert_close(found, expected)


def test_schemas_are_registered_once() -> None:
    register()
    register()
    assert {function.name for function in functions()} == set(OPERATORS)


def _run(
    name: str, inputs: dict[str, operating.Array], rows: Rows, *, cast: bool = True
) -> dict[str, operating.Array]:
    given = {**(operating.single(inputs) if cast else inputs), **rows.arrays()}
    wanted = {each: given[each] for each in OPERATORS[name].inputs}
    return operating.run(name, wanted, **operating.attributes(name))


def _assert_close(found: dict[str, operating.Array], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].shape == tuple(x.shape)
        assert error(torch.tensor(found[name]), x) < TOLERANCE, name
