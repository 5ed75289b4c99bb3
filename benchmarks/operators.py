"""The library's CausalGMA beside its function body in ONNX Runtime and the same in PyTorch.

    make ops
    python -m benchmarks.operators --out build/operators
    python -m benchmarks.operators --provider CUDAExecutionProvider --precision bfloat16 --heads 12

All from one run in which the contenders take turns, on one document; on a GPU the kernels of
`gma.model.ops.triton` are one of them, and all use one stream. Each is checked first, against
float64, and is not timed if it fails; it is given rows of the length that suits it best. Then how
far each one's state is from float64 after many steps of one long document.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from benchmarks import timing
from benchmarks.mixtures import EPSILON, Size
from benchmarks.timing import digits, markdown, progress, tokens_name
from gma.export.body import OPSET
from gma.export.operators import DOMAIN, INPUTS, OPERATORS, VERSION
from gma.model.ops import chunked
from gma.model.ops.chunked import ROUTING_EPSILON, Coefficients, Rows

HEADS = 8
LENGTHS = (4096, 16384)
ROWS = (64, 256, 1024, 4096)
PRECISIONS = {
    "float32": (torch.float32, TensorProto.FLOAT, 1e-5),
    "bfloat16": (torch.bfloat16, TensorProto.BFLOAT16, 1e-2),
}
"""Of tokens and what is read: PyTorch's type, ONNX's, and the largest relative error."""

CUDA = "CUDAExecutionProvider"
LONG = 1 << 18
"""Tokens after which the states are compared, read in steps."""

STEP = 16384

LIBRARY = "library"
BODY = "function body in ONNX Runtime"
COMPILED = "torch.compile"
EAGER = "PyTorch eager"
TRITON = "model.ops.triton"

OPERATOR = OPERATORS["CausalGMA"]
RANK = {"routed": 3, "memory": 4, "mass": 3, "linear": 3, "quadratic": 3, "bias": 2}
TYPES = {"F": TensorProto.FLOAT, "I": TensorProto.INT64, "B": TensorProto.BOOL}
ELEMENTS = {torch.float32: 1, torch.int64: 7, torch.bool: 9, torch.bfloat16: 16}

Call = Callable[[], tuple[Tensor, Tensor, Tensor]]  # out, memory and mass after


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
        mixture = Coefficients(*(x.double() for x in self.mixture))
        return Document(self.routed.double(), self.memory.double(), self.mass.double(), mixture)

    def parts(self, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and val in rows, as a layer's projection leaves them."""
        heads, _, routing = self.mixture.linear.shape
        value = self.memory.shape[-1]
        rows = self.routed.view(-1, chunk, self.routed.shape[-1])
        widths = [heads * routing, heads * routing, heads * value]
        q, k, val = (x.unflatten(-1, (heads, -1)) for x in torch.split(rows, widths, -1))
        return q, k, val


def in_torch(causal: Callable[..., Any]) -> Callable[[Document, int], Call]:
    """`gma.model.ops.chunked.causal`, or the same compiled."""

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
    """CausalGMA alone, of any shape, with its function body, for tokens of this ONNX type."""
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


def in_runtime(provider: str, library: Path | None, tokens: int) -> Callable[[Document, int], Call]:
    """ONNX Runtime, inputs and outputs bound to tensors where the provider has them.

    On a GPU it uses PyTorch's current stream, and like PyTorch does not wait for it.
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


def relative_error(found: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm(found.double() - expected)
    return float(difference / torch.linalg.vector_norm(expected))


class Checked(NamedTuple):
    contender: str
    error: float  # the largest of out, memory and mass
    passed: bool


def check(
    contenders: dict[str, Any], device: torch.device, size: Size, precision: str
) -> list[Checked]:
    """Against float64, from a state that is not zero."""
    dtype, _, tolerance = PRECISIONS[precision]
    document = Document.of(1024, size, device, dtype)
    document = document._replace(
        memory=torch.randn_like(document.memory), mass=torch.rand_like(document.mass) * 9
    )
    expected = in_torch(chunked.causal)(document.double(), 1024)()
    found = []
    for name, build in contenders.items():
        progress(f"check {name}")
        pairs = zip(build(document, 256)(), expected, strict=True)
        error = max(relative_error(*pair) for pair in pairs)
        found.append(Checked(name, error, error <= tolerance))
    return found


class Result(NamedTuple):
    contender: str
    tokens: int
    rows_of: int
    seconds: float  # median
    low: float
    high: float
    turns: int


def measure(
    contenders: dict[str, Any], document: Document, device: torch.device, rows: Sequence[int]
) -> list[Result]:
    """Each on the rows that suit it best, all taking turns."""
    tokens = len(document.routed)
    best: dict[str, tuple[int, Call]] = {}
    for name, build in contenders.items():
        progress(f"{tokens_name(tokens)} {name}")
        calls = {}
        for chunk in rows:
            if chunk <= tokens:
                calls[str(chunk)] = build(document, chunk)
                calls[str(chunk)]()  # compiles
        times = timing.turns(calls, device, rounds=5, budget_s=0.5)
        chosen = min(times, key=lambda chunk: times[chunk].seconds)
        best[name] = int(chosen), calls[chosen]
    times = timing.turns({name: call for name, (_, call) in best.items()}, device)
    return [Result(name, tokens, best[name][0], *timed) for name, timed in times.items()]


def drift(
    contenders: dict[str, Any], tokens: int, device: torch.device, size: Size, dtype: torch.dtype
) -> dict[str, float]:
    """Relative errors of memory and mass after one document's steps, the larger of the two."""
    step = min(STEP, tokens)
    first = Document.of(step, size, device, dtype)
    states = dict.fromkeys(contenders, (first.memory, first.mass))
    exact = first.memory.double(), first.mass.double()
    for _ in range(0, tokens, step):
        document = Document.of(step, size, device, dtype)._replace(mixture=first.mixture)
        for name, build in contenders.items():
            memory, mass = states[name]
            _, memory, mass = build(document._replace(memory=memory, mass=mass), 256)()
            states[name] = memory.clone(), mass.clone()
        wide = document.double()
        _, k, val = wide.parts(step)
        rows = Rows.of(torch.tensor([step]), torch.tensor([0]), step, torch.float64)
        rows = Rows(*(x.to(device) for x in rows))
        added = chunked.write(k, val, wide.mixture, rows, normalize=True)
        exact = exact[0] + added[0], exact[1] + added[1]
    return {
        name: max(relative_error(*pair) for pair in zip(found, exact, strict=True))
        for name, found in states.items()
    }


def table(
    heading: str,
    checks: Sequence[Checked],
    results: Sequence[Result],
    drifts: dict[str, float],
    long: int,
) -> str:
    text = heading + markdown(
        ["contender", "check", f"state's error after {tokens_name(long)} tokens"],
        [
            [each.contender, f"{'passed' if each.passed else 'FAILED'}, error {each.error:.1e}",
             f"{drifts[each.contender]:.1e}" if each.contender in drifts else ""]
            for each in checks
        ],
    )  # fmt: skip
    for tokens in dict.fromkeys(result.tokens for result in results):
        here = [result for result in results if result.tokens == tokens]
        ours = next((r.seconds for r in here if r.contender == LIBRARY), float("nan"))
        text += f"\n{tokens:,} tokens\n\n" + markdown(
            ["", "rows of", "median ms", "quartiles", "million tokens/s", "library is faster by"],
            [
                [r.contender, str(r.rows_of), digits(r.seconds * 1e3),
                 f"{digits(r.low * 1e3)} to {digits(r.high * 1e3)}",
                 digits(tokens / r.seconds / 1e6), f"{r.seconds / ours:.2f}"]
                for r in here
            ],
        )  # fmt: skip
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/operators"))
    parser.add_argument("--provider", default="CPUExecutionProvider", help="ONNX Runtime's")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of tokens")
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--library", type=Path, help="another than the one installed")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="tokens, to choose from")
    parser.add_argument("--long", type=int, default=LONG, help="tokens of the long document")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    if arguments.provider != CUDA:
        run(arguments, torch.device("cpu"))
        return
    # Not the default stream, which ONNX Runtime can't be given.
    with torch.cuda.stream(torch.cuda.Stream()):
        run(arguments, torch.device("cuda"))
        gc.collect()  # sessions end before the stream that they use


def run(arguments: argparse.Namespace, device: torch.device) -> None:
    library = arguments.library or import_module("gma_ops").library()
    dtype, tokens, _ = PRECISIONS[arguments.precision]
    size = Size(heads=arguments.heads)
    contenders = {
        LIBRARY: in_runtime(arguments.provider, library, tokens),
        BODY: in_runtime(arguments.provider, None, tokens),
        COMPILED: in_torch(torch.compile(chunked.causal, dynamic=False)),
        EAGER: in_torch(chunked.causal),
    }
    if device.type == "cuda":
        contenders[TRITON] = in_torch(import_module("model.ops.triton").causal)
    results: list[Result] = []
    with torch.inference_mode():
        checks = check(contenders, device, size, arguments.precision)
        passing = {each.contender: contenders[each.contender] for each in checks if each.passed}
        for length in arguments.lengths:
            document = Document.of(length, size, device, dtype)
            results += measure(passing, document, device, arguments.rows)
        progress("the long document")
        drifts = drift(passing, arguments.long, device, size, dtype)
    heading = timing.machine_line(device) + f"onnxruntime {onnxruntime.__version__}; "
    heading += ", ".join(f"{name} {n}" for name, n in size._asdict().items())
    heading += f"; {arguments.precision}\n\n"
    text = table(heading, checks, results, drifts, arguments.long)
    found = {
        "machine": timing.machine(device),
        "size": size._asdict(),
        "precision": arguments.precision,
        "checks": [each._asdict() for each in checks],
        "results": [result._asdict() for result in results],
        "drift": drifts,
    }
    timing.save(arguments.out, "operators", found, text)
    print(text)


if __name__ == "__main__":
    main()
