"""The library's mixer beside its function body in ONNX Runtime and the same in PyTorch.

    make ops
    python -m benchmarks.operators --out build/operators
    python -m benchmarks.operators --form forgetting --out build/operators-forgetting
    python -m benchmarks.operators --provider CUDAExecutionProvider --precision bfloat16 --heads 12

All is from one run in which the contenders take turns, on one document; on a GPU the kernels of
`gma.model.ops.triton` are one of them, and all use one stream. There the library and these kernels
are timed as replays of CUDA graphs, for both to be without their launches from C++ and from Python;
what can't be captured, and all others, the host launches, as the tables say. Each is first held to
float64, and is not timed if it fails. It is given rows of the length that suits it best. Then
follows how far each one's state is from float64 after many steps of one long document.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import torch
from onnx import TensorProto

from benchmarks import timing
from benchmarks.causal import (
    CUDA,
    Build,
    Document,
    forgetting_in_torch,
    forgetting_in_triton,
    in_runtime,
    in_torch,
)
from benchmarks.definitions import relative_error
from benchmarks.mixtures import Size
from benchmarks.timing import digits, markdown, progress, tokens_name
from gma.model.ops import chunked, forgetting

HEADS = 8
LENGTHS = (4096, 16384)
ROWS = (64, 256, 1024, 4096)
PRECISIONS = {
    "float32": (torch.float32, TensorProto.FLOAT, 1e-5),
    "bfloat16": (torch.bfloat16, TensorProto.BFLOAT16, 1e-2),
}
"""The type of tokens and of out, in PyTorch and in ONNX, and the largest relative error."""

LONG = 1 << 18
"""Tokens after which the states are compared."""

STEP = 16384
"""Tokens of such a document that are read at a time."""

LIBRARY = "library"
BODY = "function body in ONNX Runtime"
COMPILED = "torch.compile"
EAGER = "PyTorch eager"
TRITON = "gma.model.ops.triton"

REPLAYED = LIBRARY, TRITON
"""What is timed as CUDA graphs' replays, on a GPU. (Not the function body: ONNX Runtime gives back
its buffers in callbacks on the stream, and a graph would repeat them.)"""


class Checked(NamedTuple):
    contender: str
    error: float  # the largest of out, memory and mass
    passed: bool


def check(
    contenders: dict[str, Build], exact: Build, document: Document, tolerance: float
) -> list[Checked]:
    """Hold the contenders to float64, from a state that is not zero."""
    document = document._replace(
        memory=torch.randn_like(document.memory), mass=torch.rand_like(document.mass) * 9
    )
    expected = exact(document.double(), 1024)()
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
    captured: bool
    seconds: float  # median
    low: float
    high: float
    turns: int


def measure(
    contenders: dict[str, Build], document: Document, device: torch.device, rows: Sequence[int]
) -> list[Result]:
    """Time each on rows of the length that suits it best; all take turns."""
    tokens = len(document.routed)
    best: dict[str, tuple[int, timing.Call]] = {}
    for name, build in contenders.items():
        progress(f"{tokens_name(tokens)} {name}")
        calls: dict[str, timing.Call] = {}
        for chunk in rows:
            if chunk <= tokens:
                call = build(document, chunk)
                call()  # compiles
                replays = device.type == "cuda" and name in REPLAYED
                calls[str(chunk)] = (replays and timing.captured(call)) or call
        times = timing.turns(calls, device, rounds=5, budget_s=0.5)
        chosen = min(times, key=lambda chunk: times[chunk].seconds)
        best[name] = int(chosen), calls[chosen]
    times = timing.turns({name: call for name, (_, call) in best.items()}, device)
    return [
        Result(name, tokens, best[name][0], isinstance(best[name][1], timing.Replay), *timed)
        for name, timed in times.items()
    ]


def drift(
    contenders: dict[str, Build], exact: Build, tokens: int, make: Callable[[int], Document]
) -> dict[str, float]:
    """The relative error of memory or mass, whichever is larger, after one document's steps.

    ``make`` makes a document of so many tokens.
    """
    step = min(STEP, tokens)
    first = make(step)
    states = dict.fromkeys(contenders, (first.memory, first.mass))
    wide = first.double()
    expected = wide.memory, wide.mass
    for _ in range(0, tokens, step):
        document = make(step)._replace(mixture=first.mixture)
        for name, build in contenders.items():
            memory, mass = states[name]
            _, memory, mass = build(document._replace(memory=memory, mass=mass), 256)()
            states[name] = memory.clone(), mass.clone()
        memory, mass = expected
        wide = document.double()._replace(memory=memory, mass=mass)
        _, *found = exact(wide, 256)()
        expected = found[0], found[1]
    return {
        name: max(relative_error(*pair) for pair in zip(found, expected, strict=True))
        for name, found in states.items()
    }


def table(
    heading: str,
    checks: Sequence[Checked],
    results: Sequence[Result],
    drifts: dict[str, float],
    long: int,
) -> str:
    """The report, as Markdown."""
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
            ["", "rows of", "launched by", "median ms", "quartiles", "million tokens/s",
             "library is faster by"],
            [
                [r.contender, str(r.rows_of), "CUDA graph" if r.captured else "host",
                 digits(r.seconds * 1e3),
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
    parser.add_argument("--form", choices=("paper", "forgetting"), default="paper")
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
        _kept = run(arguments, torch.device("cuda"))
        sys.stdout.flush()
        # A session frees pinned memory when it ends, which CUDA refuses in a callback of its own
        # or after its end, and that aborts: so none ends.
        os._exit(0)


def run(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Check, time and print, on one device; return the contenders."""
    library = arguments.library or import_module("gma_ops").library()
    dtype, tokens, tolerance = PRECISIONS[arguments.precision]
    size, forgets = Size(heads=arguments.heads), arguments.form == "forgetting"
    name = "ForgettingGMA" if forgets else "CausalGMA"
    build = forgetting_in_torch if forgets else in_torch
    causal = forgetting.causal if forgets else chunked.causal
    exact = build(causal)
    contenders = {
        LIBRARY: in_runtime(name, arguments.provider, library, tokens),
        BODY: in_runtime(name, arguments.provider, None, tokens),
        COMPILED: build(torch.compile(causal, dynamic=False)),
        EAGER: exact,
    }
    if device.type == "cuda":
        triton = import_module("gma.model.ops.triton.operators").causal
        contenders[TRITON] = forgetting_in_triton if forgets else in_torch(triton)

    def make(length: int) -> Document:
        return Document.of(length, size, device, dtype, forgets=forgets)

    results: list[Result] = []
    with torch.inference_mode():
        checks = check(contenders, exact, make(1024), tolerance)
        passing = {each.contender: contenders[each.contender] for each in checks if each.passed}
        for length in arguments.lengths:
            results += measure(passing, make(length), device, arguments.rows)
        progress("the long document")
        drifts = drift(passing, exact, arguments.long, make)
    heading = timing.machine_line(device) + f"onnxruntime {onnxruntime.__version__}; "
    heading += ", ".join(f"{name} {n}" for name, n in size._asdict().items())
    heading += f"; {arguments.precision}; {name}\n\n"
    text = table(heading, checks, results, drifts, arguments.long)
    found = {
        "machine": timing.machine(device),
        "size": size._asdict(),
        "precision": arguments.precision,
        "operator": name,
        "checks": [each._asdict() for each in checks],
        "results": [result._asdict() for result in results],
        "drift": drifts,
    }
    timing.save(arguments.out, "operators", found, text)
    print(text)
    return contenders


if __name__ == "__main__":
    main()
