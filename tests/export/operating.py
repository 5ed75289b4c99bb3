"""One operator as a model of its own, and its outputs by the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional

from gma.export.body import OPSET
from gma.export.operators import DOMAIN, INPUTS, OPERATORS, OUTPUTS, VERSION
from gma.model.ops import chunked, forgetting
from gma.model.ops.forgetting import MOST_FORGOTTEN

Array = NDArray[Any]

SETTINGS: dict[str, Any] = {
    "normalize": 1,
    "epsilon": 1e-6,
    "routing_epsilon": chunked.ROUTING_EPSILON,
    "most_forgotten": MOST_FORGOTTEN,
}

H, K, r, v, W, T = 2, 5, 3, 4, 6, 3
"""Sizes that no kernel is made for, by the letters of `gma.export.operators`."""

SIZE = (H, K, r, v)


@dataclass
class Rows:
    """Rows of C tokens, and whose they are."""

    chunk: int
    lengths: list[int]
    documents: list[int]
    count: int  # D
    fresh: list[bool]

    def reference(self) -> chunked.Rows:
        """Tell the reference, which takes as many rows as documents, where they stand."""
        more = self.size - len(self.lengths)
        return chunked.Rows.of(
            torch.tensor(self.lengths + [0] * more),
            torch.tensor(self.documents + [0] * more),
            self.chunk,
            torch.float64,
        )

    @property
    def size(self) -> int:
        return max(len(self.lengths), self.count)

    def arrays(self) -> dict[str, Array]:
        return {
            "lengths": np.array(self.lengths, np.int64),
            "document_of_row": np.array(self.documents, np.int64),
            "fresh": np.array(self.fresh),
        }

    def there(self) -> NDArray[np.bool_]:
        """Tell where tokens are, (R, C) bool."""
        return np.arange(self.chunk) < np.array(self.lengths)[:, None]


def hostile(chunk: int) -> Rows:
    """Make rows of documents of every awkward length: many rows, full ones, one token, none."""
    lengths = [chunk, chunk, max(chunk - 1, 1), chunk, 1, chunk, 1, 0]
    return Rows(
        chunk,
        lengths,
        documents=[4, 4, 4, 0, 2, 6, 6, 1],
        count=7,
        fresh=[False, True, True, False, False, False, True],
    )


def run(
    name: str,
    inputs: dict[str, Array],
    library: Path | None = None,
    *,
    through: int = TensorProto.FLOAT,
    threads: int = 1,
    **attributes: Any,
) -> dict[str, Array]:
    """Run the operator on the CPU; its outputs by name. ``library`` takes its body's place.

    For ``through`` see `model`.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if library:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(
        model(name, inputs, through=through, **attributes),
        options,
        providers=["CPUExecutionProvider"],
    )
    return dict(zip(OPERATORS[name].outputs, session.run(None, inputs), strict=True))


def model(
    name: str,
    inputs: dict[str, Array],
    *,
    through: int = TensorProto.FLOAT,
    **attributes: object,
) -> bytes:
    """Make a model of the operator alone, for such inputs.

    With ``through``, float32 activations are cast to that type in the model, and back behind it.
    """
    operator = OPERATORS[name]
    activations = [n for n in operator.inputs if n in inputs and INPUTS[n][0] == "T0"]
    results = [n for n in operator.outputs if OUTPUTS[n][0] == "T0"]
    casts = through != TensorProto.FLOAT

    def inner(names: Sequence[str]) -> list[str]:
        return [f"{n}_cast" if casts and n in activations + results else n for n in names]

    given = inner([each if each in inputs else "" for each in operator.inputs])
    node = helper.make_node(
        name,
        given if given[-1] else given[:-1],
        inner(operator.outputs),
        domain=DOMAIN,
        overload=operator.optional if operator.optional in inputs else "",
        **attributes,  # type: ignore[arg-type]
    )
    types = {n: helper.np_dtype_to_tensor_dtype(x.dtype) for n, x in inputs.items()}
    nodes = [node]
    if casts:
        into = [helper.make_node("Cast", [n], inner([n]), to=through) for n in activations]
        back = [helper.make_node("Cast", inner([n]), [n], to=TensorProto.FLOAT) for n in results]
        nodes = [*into, node, *back]
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(n, types[n], x.shape) for n, x in inputs.items()],
        [
            helper.make_tensor_value_info(
                n, types[activations[0]] if n in results else TensorProto.FLOAT, None
            )
            for n in operator.outputs
        ],
    )
    whole: bytes = helper.make_model(
        graph,
        functions=operator.functions(),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    ).SerializeToString()
    return whole


def attributes(name: str) -> dict[str, Any]:
    """List the attributes that a node of the operator is tested with."""
    return {n: SETTINGS[n] for n in OPERATORS[name].attributes if n in SETTINGS}


def mixture_inputs(rows: Rows, size: tuple[int, int, int, int] = SIZE) -> dict[str, Array]:
    """Make random inputs of CausalGMA in float64; ``size`` is H, K, r, v."""
    heads, components, routing, value = size
    rng = np.random.default_rng(1)
    var = rng.uniform(0.5, 3.0, (heads, components, routing))
    mu = rng.normal(size=(heads, components, routing))
    log_pi = torch.log_softmax(torch.zeros(heads, components), -1).double()
    mixture = chunked.Coefficients.of(torch.tensor(mu), torch.tensor(var), log_pi)
    return {
        "routed": rng.normal(size=(len(rows.lengths), rows.chunk, heads * (2 * routing + value))),
        "memory": rng.normal(size=(rows.count, heads, components, value)),
        "mass": rng.uniform(0.1, 9.0, (rows.count, heads, components)),
        **{name: x.numpy() for name, x in zip(mixture._fields, mixture, strict=True)},
    }


def forgetting_inputs(
    rows: Rows, size: tuple[int, int, int, int] = SIZE, *, keep_bias: float | None = None
) -> dict[str, Array]:
    """Make random inputs of ForgettingGMA in float64; what is passed over is NaN.

    Heads forget at all rates there are, or as this bias says.
    """
    heads, _, _, value = size
    inputs = mixture_inputs(rows, size)
    rng = np.random.default_rng(3)
    gates = rng.normal(size=(*inputs["routed"].shape[:2], heads * value + heads - 1))
    used = inputs["routed"].shape[2] + gates.shape[2]
    nothing = np.full((*gates.shape[:2], -used % 16), np.nan)
    bounds = (-1.0, -9.0) if keep_bias is None else (keep_bias, keep_bias)
    return {
        **inputs,
        "routed": np.concatenate([inputs["routed"], gates * 2.0, nothing], axis=2),
        "keep_bias": np.linspace(*bounds, heads - 1),
    }


def convolution_inputs(rows: Rows, width: int = W) -> dict[str, Array]:
    """Make random inputs of ShortConvolution in float64."""
    rng = np.random.default_rng(2)
    return {
        "x": rng.normal(size=(len(rows.lengths), rows.chunk, width)),
        "tail": rng.normal(size=(rows.count, T, width)),
        "scale": rng.uniform(0.5, 2.0, width),
        "taps": rng.normal(size=(T + 1, width)),
    }


STATEFUL = ("CausalGMA", "ForgettingGMA", "ShortConvolution")
"""The operators over rows and their documents' states."""

MIXERS = STATEFUL[:2]

TOKENS = {"CausalGMA": "routed", "ForgettingGMA": "routed", "ShortConvolution": "x"}
"""The input of each that holds tokens."""

STATES = {
    "CausalGMA": ("memory", "mass"),
    "ForgettingGMA": ("memory", "mass"),
    "ShortConvolution": ("tail",),
}
"""The inputs of each that hold states."""


def inputs_of(name: str, rows: Rows, *size: Any) -> dict[str, Array]:
    """Make random inputs, in float64, of one of ``STATEFUL``; ``size`` as its own function has."""
    make: dict[str, Callable[..., dict[str, Array]]] = {
        "CausalGMA": mixture_inputs,
        "ForgettingGMA": forgetting_inputs,
        "ShortConvolution": convolution_inputs,
    }
    return make[name](rows, *size)


def reference_of(name: str, inputs: dict[str, Array], rows: Rows) -> dict[str, Tensor]:
    """Compute the outputs of one of ``STATEFUL`` in float64."""
    compute = {
        "CausalGMA": mixture_reference,
        "ForgettingGMA": forgetting_reference,
        "ShortConvolution": convolution_reference,
    }
    return compute[name](inputs, rows)


def single(inputs: dict[str, Array]) -> dict[str, Array]:
    """Round to float32."""
    return {name: x.astype(np.float32) for name, x in inputs.items()}


def _filled(x: Array, size: int) -> Tensor:
    return functional.pad(torch.tensor(x), (0, 0) * (x.ndim - 1) + (0, size - len(x)))


def mixture_reference(inputs: dict[str, Array], rows: Rows) -> dict[str, Tensor]:
    """Compute CausalGMA's outputs with `gma.model.ops.chunked` in float64."""
    given = _Given.of(inputs, rows)
    out, memory_after, mass_after = chunked.causal(
        *given.tokens, *given.states, given.mixture, rows.reference(), normalize=True, epsilon=1e-6
    )
    return given.told(out.flatten(2), memory_after, mass_after)


def forgetting_reference(inputs: dict[str, Array], rows: Rows) -> dict[str, Tensor]:
    """Compute ForgettingGMA's outputs with `gma.model.ops.forgetting` in float64."""
    given = _Given.of(inputs, rows)
    heads, value = inputs["memory"].shape[1], inputs["memory"].shape[3]
    widths = [heads * value, heads - 1]
    rest = given.others.shape[2] - sum(widths)
    opened, rates, _ = torch.split(given.others, [*widths, rest], dim=-1)
    rates = functional.softplus(rates + torch.tensor(inputs["keep_bias"])).clamp_max(MOST_FORGOTTEN)
    log_keep = functional.pad(-rates, (1, 0))
    where = rows.reference()
    out, memory_after, mass_after = forgetting.causal(
        *given.tokens, *given.states, given.mixture, log_keep, where, normalize=True, epsilon=1e-6
    )
    out = out.flatten(2) * torch.sigmoid(opened)
    gamma = chunked.responsibilities(given.tokens[1], given.mixture, normalize=True)
    gamma = gamma.masked_fill(~where.valid[:, None, :, None], 0.0)
    usage = gamma.sum(2)[: len(rows.lengths)]
    return {**given.told(out, memory_after, mass_after), "usage": usage}


@dataclass
class _Given:
    """A mixer's inputs as `gma.model.ops` takes them."""

    tokens: tuple[Tensor, Tensor, Tensor]  # q, k and val (R, C, H, .)
    others: Tensor  # (R, C, .)
    states: tuple[Tensor, Tensor]
    mixture: chunked.Coefficients
    rows: Rows

    @classmethod
    def of(cls, inputs: dict[str, Array], rows: Rows) -> _Given:
        (heads, _, routing), value = inputs["linear"].shape, inputs["memory"].shape[-1]
        routed = _filled(inputs["routed"], rows.size)
        widths = [heads * routing, heads * routing, heads * value]
        rest = routed.shape[2] - sum(widths)
        q, k, val, others = torch.split(routed, [*widths, rest], dim=-1)
        shape = *routed.shape[:2], heads, -1
        memory, mass = inputs["memory"].copy(), inputs["mass"].copy()
        memory[rows.fresh], mass[rows.fresh] = 0.0, 0.0
        return cls(
            (q.reshape(shape), k.reshape(shape), val.reshape(shape)),
            others,
            (_filled(memory, rows.size), _filled(mass, rows.size)),
            chunked.Coefficients(*(torch.tensor(inputs[n]) for n in chunked.Coefficients._fields)),
            rows,
        )

    def told(self, out: Tensor, memory_after: Tensor, mass_after: Tensor) -> dict[str, Tensor]:
        """Name what an operator gives, with zeros where no token is."""
        there = torch.tensor(self.rows.there())[..., None]
        return {
            "out": torch.where(there, out[: len(self.rows.lengths)], 0.0),
            "memory_after": memory_after[: self.rows.count],
            "mass_after": mass_after[: self.rows.count],
        }


def convolution_reference(inputs: dict[str, Array], rows: Rows) -> dict[str, Tensor]:
    """Compute ShortConvolution's outputs in float64, on each document's rows joined."""
    x, tail, scale, taps = (torch.tensor(inputs[n]) for n in ("x", "tail", "scale", "taps"))
    y, after = torch.zeros_like(x), tail.clone()
    after[torch.tensor(rows.fresh)] = 0.0
    for document in range(rows.count):
        mine = [i for i, d in enumerate(rows.documents) if d == document and rows.lengths[i]]
        if not mine:
            continue
        joined = torch.cat([x[i, : rows.lengths[i]] for i in mine])
        own = functional.rms_norm(joined, scale.shape, scale, 1e-6)
        seen = torch.cat([after[document], own])
        update = (seen.unfold(0, T + 1, 1) * taps.T).sum(-1)
        parts = torch.split(joined + update, [rows.lengths[i] for i in mine])
        for i, part in zip(mine, parts, strict=True):
            y[i, : len(part)] = part
        after[document] = seen[-T:]
    return {"y": y, "normal": functional.rms_norm(y, scale.shape, eps=1e-6), "tail_after": after}
