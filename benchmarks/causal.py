"""CausalGMA on one document, in PyTorch and in ONNX Runtime, as calls that can be timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from benchmarks.mixtures import EPSILON, Size
from gma.export.body import OPSET
from gma.export.operators import DOMAIN, INPUTS, OPERATORS, VERSION
from gma.model.ops.chunked import ROUTING_EPSILON, Coefficients, Rows

CUDA = "CUDAExecutionProvider"

OPERATOR = OPERATORS["CausalGMA"]
RANK = {"routed": 3, "memory": 4, "mass": 3, "linear": 3, "quadratic": 3, "bias": 2}
TYPES = {"F": TensorProto.FLOAT, "I": TensorProto.INT64, "B": TensorProto.BOOL}
ELEMENTS = {torch.float32: 1, torch.int64: 7, torch.bool: 9, torch.bfloat16: 16}

Call = Callable[[], tuple[Tensor, Tensor, Tensor]]
"""Gives out, and memory and mass after the document."""

Build = Callable[["Document", int], Call]
"""Takes a document, and the tokens of each of its rows."""


class Document(NamedTuple):
    """Tokens of one document, its state before them, and the mixture."""

    routed: Tensor  # (N, H * (2r + v))
    memory: Tensor  # (1, H, K, v)
    mass: Tensor  # (1, H, K)
    mixture: Coefficients

    @classmethod
    def of(
        cls, tokens: int, size: Size, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Document:
        """A random document, before which there was nothing, and a random mixture."""
        heads, r, components, v = size
        routed = torch.randn(tokens, heads * (2 * r + v), device=device)
        routed[:, 2 * heads * r :] += 0.5  # so that means of many values do not vanish
        shape = heads, components, r
        var = torch.rand(shape, device=device) * 2 + 0.5
        log_pi = torch.randn(shape[:2], device=device).log_softmax(-1)
        mixture = Coefficients.of(torch.randn(shape, device=device), var, log_pi)
        memory = torch.zeros(1, heads, components, v, device=device)
        return cls(routed.to(dtype), memory, memory[..., 0].contiguous(), mixture)

    def double(self) -> Document:
        """The same in float64."""
        mixture = Coefficients(*(x.double() for x in self.mixture))
        return Document(self.routed.double(), self.memory.double(), self.mass.double(), mixture)

    def parts(self, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and val in rows of ``chunk`` tokens, as a layer's projection leaves them."""
        heads, _, routing = self.mixture.linear.shape
        value = self.memory.shape[-1]
        rows = self.routed.view(-1, chunk, self.routed.shape[-1])
        widths = [heads * routing, heads * routing, heads * value]
        q, k, val = (x.unflatten(-1, (heads, -1)) for x in torch.split(rows, widths, -1))
        return q, k, val


def in_torch(causal: Callable[..., Any]) -> Build:
    """A build of `gma.model.ops.chunked.causal`, or of what has its signature."""

    def build(document: Document, chunk: int) -> Call:
        q, k, val = document.parts(chunk)
        lengths = torch.full((len(q),), chunk, device=q.device)
        rows = Rows.of(lengths, torch.zeros_like(lengths), chunk, document.mass.dtype)
        rows = rows._replace(belongs=rows.belongs[:1], first=rows.first[:1], count=rows.count[:1])

        def run() -> tuple[Tensor, Tensor, Tensor]:
            out, memory, mass = causal(
                q, k, val, document.memory, document.mass, document.mixture, rows,
                normalize=True, epsilon=EPSILON,
            )  # fmt: skip
            return out.flatten(2).flatten(0, 1), memory, mass

        return run

    return build


def model(tokens: int) -> bytes:
    """A serialized model of CausalGMA alone and its function body, for tokens of this ONNX type."""
    types = TYPES | {"T0": tokens}
    node = helper.make_node(
        OPERATOR.name, OPERATOR.inputs, OPERATOR.outputs, domain=DOMAIN,
        normalize=1, epsilon=EPSILON, routing_epsilon=ROUTING_EPSILON,
    )  # fmt: skip
    inputs = [
        helper.make_tensor_value_info(n, types[INPUTS[n][0]], [None] * RANK.get(n, 1))
        for n in OPERATOR.inputs
    ]
    outputs = [
        helper.make_tensor_value_info(n, tokens if n == "out" else TensorProto.FLOAT, None)
        for n in OPERATOR.outputs
    ]
    made = helper.make_model(
        helper.make_graph([node], OPERATOR.name, inputs, outputs),
        functions=OPERATOR.functions(),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    serialized: bytes = made.SerializeToString()
    return serialized


def in_runtime(provider: str, library: Path | None, tokens: int) -> Build:
    """A build in ONNX Runtime, whose inputs and outputs are tensors where the provider has them.

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
        model(tokens), options, providers=[(provider, of_provider)]
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
        width = document.mixture.linear.shape[0] * document.memory.shape[-1]
        results = {
            "out": torch.empty(rows, chunk, width, device=device, dtype=routed.dtype),
            "memory_after": torch.empty_like(document.memory),
            "mass_after": torch.empty_like(document.mass),
        }
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
