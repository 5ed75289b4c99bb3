"""Both mixers' operators on one document, in PyTorch and in ONNX Runtime, as calls to be timed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from benchmarks.mixtures import EPSILON, Size
from gma.export.body import OPSET
from gma.export.operators import DOMAIN, INPUTS, OPERATORS, VERSION, Operator
from gma.model.config import LASTING
from gma.model.ops.chunked import ROUTING_EPSILON, Coefficients, Rows
from gma.model.ops.forgetting import MOST_FORGOTTEN

CUDA = "CUDAExecutionProvider"

RANK = {"routed": 3, "memory": 4, "mass": 3, "linear": 3, "quadratic": 3, "bias": 2}
TYPES = {"F": TensorProto.FLOAT, "I": TensorProto.INT64, "B": TensorProto.BOOL}
ELEMENTS = {torch.float32: 1, torch.int64: 7, torch.bool: 9, torch.bfloat16: 16}

Call = Callable[[], tuple[Tensor, Tensor, Tensor]]
"""Gives out, and memory and mass after the document."""

Build = Callable[["Document", int], Call]
"""Takes a document, and the tokens of each of its rows."""


class Document(NamedTuple):
    """Tokens of one document, its state before them, and the mixture."""

    routed: Tensor  # (N, H * (2r + v)), or with gates and rates behind them
    memory: Tensor  # (1, H, K, v)
    mass: Tensor  # (1, H, K)
    mixture: Coefficients
    keep_bias: Tensor | None  # (F,) if heads forget

    @classmethod
    def of(
        cls,
        tokens: int,
        size: Size,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        forgets: bool = False,
    ) -> Document:
        """A random document, before which there was nothing, and a random mixture.

        If heads forget, then at half-lives from some tokens to some thousands.
        """
        heads, r, components, v = size
        width, keep_bias = heads * (2 * r + v), None
        if forgets:
            keep_bias = torch.linspace(-2.0, -8.0, heads - LASTING, device=device)
            width += heads * v + len(keep_bias)
            width += -width % 16
        routed = torch.randn(tokens, width, device=device)
        routed[:, 2 * heads * r : heads * (2 * r + v)] += 0.5  # so that means do not vanish
        shape = heads, components, r
        var = torch.rand(shape, device=device) * 2 + 0.5
        log_pi = torch.randn(shape[:2], device=device).log_softmax(-1)
        mixture = Coefficients.of(torch.randn(shape, device=device), var, log_pi)
        memory = torch.zeros(1, heads, components, v, device=device)
        mass = memory[..., 0].contiguous()
        return cls(routed.to(dtype), memory, mass, mixture, keep_bias)

    def double(self) -> Document:
        """The same in float64."""
        mixture = Coefficients(*(x.double() for x in self.mixture))
        states = self.memory.double(), self.mass.double()
        keep_bias = None if self.keep_bias is None else self.keep_bias.double()
        return Document(self.routed.double(), *states, mixture, keep_bias)

    def parts(self, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and val in rows of ``chunk`` tokens, as a layer's projection leaves them."""
        heads, _, routing = self.mixture.linear.shape
        value = self.memory.shape[-1]
        rows = self.routed.view(-1, chunk, self.routed.shape[-1])
        own = rows[..., : heads * (2 * routing + value)]
        widths = [heads * routing, heads * routing, heads * value]
        q, k, val = (x.unflatten(-1, (heads, -1)) for x in torch.split(own, widths, -1))
        return q, k, val

    def gates(self, chunk: int) -> tuple[Tensor, Tensor]:
        """What is projected of the output's gates (R, C, H, v), and of the rates (R, C, F)."""
        assert self.keep_bias is not None
        heads, _, routing = self.mixture.linear.shape
        value = self.memory.shape[-1]
        first, read = heads * (2 * routing + value), heads * value
        rows = self.routed.view(-1, chunk, self.routed.shape[-1])
        rates = rows[..., first + read : first + read + len(self.keep_bias)]
        return rows[..., first : first + read].unflatten(-1, (heads, -1)), rates

    def rows(self, chunk: int) -> Rows:
        """The document's rows of ``chunk`` tokens."""
        lengths = torch.full((len(self.routed) // chunk,), chunk, device=self.routed.device)
        rows = Rows.of(lengths, torch.zeros_like(lengths), chunk, self.mass.dtype)
        return rows._replace(belongs=rows.belongs[:1], first=rows.first[:1], count=rows.count[:1])


def in_torch(causal: Callable[..., Any]) -> Build:
    """A build of `gma.model.ops.chunked.causal`, or of what has its signature."""

    def build(document: Document, chunk: int) -> Call:
        q, k, val = document.parts(chunk)
        rows = document.rows(chunk)

        def run() -> tuple[Tensor, Tensor, Tensor]:
            out, memory, mass = causal(
                q, k, val, document.memory, document.mass, document.mixture, rows,
                normalize=True, epsilon=EPSILON,
            )  # fmt: skip
            return out.flatten(2).flatten(0, 1), memory, mass

        return run

    return build


def forgetting_in_torch(forgetting: Callable[..., Any]) -> Build:
    """A build of `gma.model.ops.forgetting.causal`, or of what has its signature, with what the
    operator does beside it."""

    def whole(document: Document, chunk: int, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        assert document.keep_bias is not None
        opened, rates = document.gates(chunk)
        wide = rates.to(document.keep_bias.dtype) + document.keep_bias
        log_keep = -torch.nn.functional.softplus(wide).clamp_max(MOST_FORGOTTEN)
        log_keep = torch.nn.functional.pad(log_keep, (LASTING, 0))
        out, memory, mass = forgetting(
            *document.parts(chunk), document.memory, document.mass, document.mixture, log_keep,
            rows, normalize=True, epsilon=EPSILON,
        )  # fmt: skip
        return (out * torch.sigmoid(opened)).flatten(2).flatten(0, 1), memory, mass

    def build(document: Document, chunk: int) -> Call:
        rows = document.rows(chunk)
        return lambda: whole(document, chunk, rows)

    return build


def forgetting_in_triton(document: Document, chunk: int) -> Call:
    """The kernels of `gma.model.ops.triton`, launched as the fused step does."""
    launches = import_module("gma.model.ops.triton.launch")
    forget = import_module("gma.model.fused.tokens").forget
    assert document.keep_bias is not None
    q, k, val = document.parts(chunk)
    opened, _ = document.gates(chunk)
    heads, components, routing = document.mixture.linear.shape
    value, rows = val.shape[-1], document.rows(chunk)
    launcher = launches.Launcher.of(q, components, value, True, None)
    single = {"device": q.device, "dtype": torch.float32}
    kept = launches.Kept(
        torch.empty(launcher.gammas_shape, device=q.device, dtype=q.dtype),
        torch.empty(launcher.masses_shape, **single),  # type: ignore[arg-type]
    )
    shape = len(q), heads
    units = launches.Units(
        torch.empty(*shape, chunk, **single),  # type: ignore[arg-type]
        torch.empty(*shape, launcher.blocks, **single),  # type: ignore[arg-type]
    )
    out = torch.empty(val.shape, device=q.device, dtype=q.dtype)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        launches.launch(
            forget, (len(q) * launcher.blocks,), projected=document.routed,
            keep_bias=document.keep_bias, lengths=rows.lengths, **units._asdict(), C=chunk,
            width=document.routed.shape[1], most=MOST_FORGOTTEN,
            AT=heads * (2 * routing + 2 * value), H=heads, LASTING=LASTING,
            BLOCK=launcher.cut.block, HEADS=1 << (heads - 1).bit_length(),
        )  # fmt: skip
        before, memory, mass = launcher.states_before(
            k, val, units, document.memory, document.mass, document.mixture, rows.lengths,
            rows.first, rows.count, kept,
        )  # fmt: skip
        launcher.read_segments(
            q, val, units, document.mixture, rows.lengths, before.sums, kept, out,
            epsilon=EPSILON, open_gate=opened,
        )  # fmt: skip
        return out.flatten(2).flatten(0, 1), memory, mass

    return run


def model(operator: Operator, tokens: int) -> bytes:
    """A serialized model of a mixer's operator alone and its function body, for tokens of this ONNX
    type."""
    types = TYPES | {"T0": tokens}
    settings = {
        "normalize": 1, "epsilon": EPSILON, "routing_epsilon": ROUTING_EPSILON,
        "most_forgotten": MOST_FORGOTTEN,
    }  # fmt: skip
    node = helper.make_node(
        operator.name, operator.inputs, operator.outputs, domain=DOMAIN,
        **{name: settings[name] for name in operator.attributes},
    )  # fmt: skip
    inputs = [
        helper.make_tensor_value_info(n, types[INPUTS[n][0]], [None] * RANK.get(n, 1))
        for n in operator.inputs
    ]
    outputs = [
        helper.make_tensor_value_info(n, tokens if n == "out" else TensorProto.FLOAT, None)
        for n in operator.outputs
    ]
    made = helper.make_model(
        helper.make_graph([node], operator.name, inputs, outputs),
        functions=operator.functions(),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    serialized: bytes = made.SerializeToString()
    return serialized


def in_runtime(name: str, provider: str, library: Path | None, tokens: int) -> Build:
    """A build of the operator of this name in ONNX Runtime, whose inputs and outputs are tensors
    where the provider has them.

    On a GPU it uses PyTorch's current stream, and like PyTorch does not wait for it. Raises
    RuntimeError if there is no such provider.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Idle threads that spin would take the cores from whoever has the next turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(str(library))
    of_provider, of_run = {}, onnxruntime.RunOptions()
    if provider == CUDA:
        onnxruntime.preload_dlls()
        stream = str(torch.cuda.current_stream().cuda_stream)
        of_provider = {"use_tf32": "0", "user_compute_stream": stream}
        of_run.add_run_config_entry("disable_synchronize_execution_providers", "1")
    session = onnxruntime.InferenceSession(
        model(OPERATORS[name], tokens), options, providers=[(provider, of_provider)]
    )
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"no {provider} here")

    def build(document: Document, chunk: int) -> Call:
        routed = document.routed.view(-1, chunk, document.routed.shape[-1])
        device, rows = routed.device, len(routed)
        given = {
            "routed": routed,
            "memory": document.memory,
            "mass": document.mass,
            **document.mixture._asdict(),
            "lengths": torch.full((rows,), chunk, device=device),
            "document_of_row": torch.zeros(rows, dtype=torch.int64, device=device),
            "fresh": torch.zeros(1, dtype=torch.bool, device=device),
        }
        if document.keep_bias is not None:
            given["keep_bias"] = document.keep_bias
        width = document.mixture.linear.shape[0] * document.memory.shape[-1]
        results = {
            "out": torch.empty(rows, chunk, width, device=device, dtype=routed.dtype),
            "memory_after": torch.empty_like(document.memory),
            "mass_after": torch.empty_like(document.mass),
        }
        if document.keep_bias is not None:
            results["usage"] = document.mass.new_empty(rows, *document.mass.shape[1:])
        binding = session.io_binding()
        for bind, tensors in ((binding.bind_input, given), (binding.bind_output, results)):
            for name, x in tensors.items():
                element = ELEMENTS[x.dtype]
                bind(name, device.type, device.index or 0, element, x.shape, x.data_ptr())

        def run() -> tuple[Tensor, Tensor, Tensor]:
            session.run_with_iobinding(binding, of_run)
            return results["out"].flatten(0, 1), results["memory_after"], results["mass_after"]

        run.inputs = given  # type: ignore[attr-defined]  # bound by address: they stay alive
        return run

    return build
