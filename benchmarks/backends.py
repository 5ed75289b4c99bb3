"""PyTorch and ONNX Runtime on one checkpoint: how fast each is, and whether they say the same.

    python -m benchmarks.backends                               full steps
    python -m benchmarks.backends --data BOOKS                  and answers to a split's documents
    python -m benchmarks.backends --data BOOKS --bytes 16384    to their first bytes
    python -m benchmarks.backends --precision bfloat16          as on a GPU
    python -m benchmarks.backends --layers                      PyTorch without our kernels for CPUs

Each backend runs as the service runs it, on the same grid. Steps take turns within one run, so
what else the machine does falls on both. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import os

# As the command `gma` has it: threads that spin would take the other backend's cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks import timing
from benchmarks.checkpoints import BOOKS
from benchmarks.engine import Comparison, speeds
from benchmarks.precision import Scores, prefixes, read
from gma.export.artifact import Artifact, export
from gma.model import weights
from gma.model.training.splits import Splits
from gma.service.engine.step import Runner
from gma.service.runners.loading import load, torch_runner
from gma.service.settings import Settings


@dataclass(frozen=True)
class Agreement:
    """What both said of the same documents."""

    documents: int
    labels: int  # that are the same
    difference: float  # largest, of any score
    accuracy: dict[str, float]  # of each backend


def agreement(scores: Mapping[str, Scores], labels: Sequence[int]) -> Agreement:
    """Compare each backend's scores (documents, labels) of the same documents."""
    found = {name: x.argmax(1) for name, x in scores.items()}
    return Agreement(
        len(labels),
        int(np.sum(found["torch"] == found["onnx"])),
        float(np.abs(scores["torch"] - scores["onnx"]).max()),
        {name: float(np.mean(x == np.array(labels))) for name, x in found.items()},
    )


def loaded(
    artifact: Artifact, checkpoint: Path, arguments: argparse.Namespace
) -> dict[str, Runner]:
    """Both backends' runners, warmed up."""
    common = {
        "device": arguments.device,
        "threads": arguments.threads,
        "rows": arguments.rows,
        "chunk_tokens": artifact.manifest.chunk,
    }
    settings = {
        "torch": Settings.load(checkpoint=checkpoint, dtype=arguments.torch_dtype, **common),
        "onnx": Settings.load(
            checkpoint=artifact.folder, backend="onnx", ops_library=arguments.library, **common
        ),
    }
    runners = {name: load(each).runner for name, each in settings.items()}
    if arguments.layers:
        classifier = weights.load(checkpoint, device=arguments.device).classifier
        classifier.kernels = None
        runners["torch"] = torch_runner(classifier, settings["torch"])
    for runner in runners.values():
        timing.progress(f"{runner.backend} on {runner.device}, {runner.dtype}: {runner.kernels}")
        runner.warm_up()
    return runners


def compared(
    runners: Mapping[str, Runner], artifact: Artifact, arguments: argparse.Namespace
) -> Agreement:
    """Let both backends read the documents of the split."""
    names = {label: i for i, label in enumerate(artifact.config.labels)}
    documents = list(Splits(arguments.data).read(arguments.split))[: arguments.limit]
    texts = [document.text.encode() for document in documents]
    tokens = prefixes(texts, artifact.tokenizer, sizes=[arguments.bytes])
    scores = {}
    for name, runner in runners.items():
        timing.progress(f"{name}: {len(documents)} documents")
        scores[name] = asyncio.run(read(runner, tokens))[arguments.bytes]
    return agreement(scores, [names[document.label] for document in documents])


def table(runners: Mapping[str, Runner], speed: Comparison, same: Agreement | None) -> str:
    """The report, as Markdown."""
    torch_, onnx = runners["torch"], runners["onnx"]
    rows, chunk = torch_.grids[-1]
    lines = [
        ("runs", f"{torch_.kernels}, {torch_.dtype}", f"{onnx.kernels}, {onnx.dtype}"),
        (f"full steps, {rows} x {chunk}, tokens/s", f"{speed.base:,.0f}", f"{speed.other:,.0f}"),
        ("against PyTorch, median round", "1", f"{speed.ratio:.2f}"),
    ]
    if same:
        lines += [
            ("accuracy", f"{same.accuracy['torch']:.4f}", f"{same.accuracy['onnx']:.4f}"),
            ("labels as PyTorch's", "", f"{same.labels} of {same.documents}"),
            ("largest difference of a score", "", f"{same.difference:.1e}"),
        ]
    return timing.markdown(("", "PyTorch", "ONNX Runtime"), lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=BOOKS)
    parser.add_argument("--exported", type=Path, help="its export; by default a new one")
    parser.add_argument("--precision", default="float32", help="of the new export")
    parser.add_argument("--chunk", type=int, help="of the new export; by default the device's")
    parser.add_argument("--torch-dtype", default="auto", help="GMA_DTYPE of PyTorch")
    parser.add_argument("--library", default="auto", help="GMA_OPS_LIBRARY")
    parser.add_argument("--layers", action="store_true", help="PyTorch without kernels for CPUs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: every core")
    parser.add_argument("--rows", type=int, default=0, help="0: the device's")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--data", type=Path, help="folder of the splits")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="documents, the first")
    parser.add_argument("--bytes", type=int, help="of each document, the first")
    parser.add_argument("--out", type=Path, default=Path("build/backends"))
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    with TemporaryDirectory() as temporary:
        if arguments.exported:
            artifact = Artifact.open(arguments.exported)
        else:
            _, chunk = Settings.load().grid(on_gpu=device.type == "cuda")
            artifact = export(
                arguments.checkpoint,
                Path(temporary) / "exported",
                precision=arguments.precision,
                chunk=arguments.chunk or chunk,
            )
        if arguments.data and artifact.config.multi_label:
            parser.error("--data: best labels are compared, and a multi-label model has none")
        runners = loaded(artifact, arguments.checkpoint, arguments)
        taken = speeds(runners, arguments.rounds)
        speed = Comparison.of(taken["torch"], taken["onnx"])
        same = compared(runners, artifact, arguments) if arguments.data else None
    results = {
        "machine": timing.machine(device),
        "speed": asdict(speed),
        "agreement": same and asdict(same),
    }
    found = table(runners, speed, same)
    timing.save(arguments.out, "backends", results, found)
    print(timing.machine_line(device) + found)


if __name__ == "__main__":
    main()
