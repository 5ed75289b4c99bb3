"""What a checkpoint loses in lower precision, at prefixes of a split's documents.

    python -m benchmarks.precision --data BOOKS
    python -m benchmarks.precision --data BOOKS --limit 20      the first documents only

Every precision reads the same tokens through the engine and its own runner: float32 in PyTorch,
and on a GPU bfloat16 and fp8 in the fused kernels. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import timing
from benchmarks.checkpoints import BOOKS
from benchmarks.engine import running
from gma.model import weights
from gma.model.classifier import Classifier
from gma.model.tokenizer import Tokenizer
from gma.model.training.splits import Splits
from gma.service.engine.engine import Engine
from gma.service.engine.opening import Opening, Tokens
from gma.service.engine.step import Runner
from gma.service.gateway.scores import scores as scores_of
from gma.service.runners.loading import torch_runner
from gma.service.runners.torch import TorchRunner
from gma.service.settings import Settings

PREFIXES = (1 << 10, 4 << 10, 16 << 10, 64 << 10, None)
"""Bytes of a document that are read; None for all of them."""
PIECE_BYTES = 1 << 18
AT_ONCE = 128

Scores = NDArray[np.float64]  # (documents, labels)


@dataclass(frozen=True)
class Row:
    """What one precision says of all documents up to one prefix."""

    prefix: int | None
    precision: str
    accuracy: float
    agree: int  # labels that are float32's
    difference: float  # largest, of any score from float32's
    documents: int


def prefixes(
    texts: Sequence[bytes], tokenizer: Tokenizer, sizes: Sequence[int | None] = PREFIXES
) -> dict[int | None, list[Tokens]]:
    """Each text's tokens up to each prefix, without a character that is cut in two."""

    def encode(text: bytes) -> Tokens:
        stream = tokenizer.stream()
        pieces = [text[i : i + PIECE_BYTES] for i in range(0, len(text), PIECE_BYTES)]
        return np.concatenate([*map(stream.feed, pieces), stream.finish()])

    heads = {
        prefix: [text[:prefix].decode(errors="ignore").encode() for text in texts]
        for prefix in sizes
    }
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return {prefix: list(threads.map(encode, cut)) for prefix, cut in heads.items()}


async def read(
    runner: Runner, documents: dict[int | None, list[Tokens]]
) -> dict[int | None, Scores]:
    """Every document's scores: many documents at once, one prefix after the other."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(engine: Engine, name: str, tokens: Tokens) -> Scores:
        async with places:
            opening = Opening(name, tokens, last=True, evidence=False, running=False)
            *_, final = [progress async for progress in engine.open(opening)]
            return scores_of(final.logits, multi_label=False)

    scores = {}
    async with running(runner) as engine:
        for prefix, cut in documents.items():
            reading = (one(engine, str(i), tokens) for i, tokens in enumerate(cut))
            scores[prefix] = np.stack(await asyncio.gather(*reading))
    return scores


def make(classifier: Classifier, precision: str) -> Runner:
    """The service's runner; for float32 the one without a compiler, which is as exact."""
    settings = Settings.load(dtype=precision)
    if precision != "float32":
        return torch_runner(classifier, settings)
    rows, chunk = settings.grid(on_gpu=classifier.embedding.weight.is_cuda)
    return TorchRunner(classifier, slots=settings.slots, rows=rows, chunk=chunk)


def compared(scores: dict[str, dict[int | None, Scores]], labels: NDArray[np.int64]) -> list[Row]:
    """Compare each precision with float32, prefix by prefix."""
    return [
        Row(
            prefix,
            precision,
            float(np.mean(found[prefix].argmax(1) == labels)),
            int(np.sum(found[prefix].argmax(1) == exact.argmax(1))),
            float(np.abs(found[prefix] - exact).max()),
            len(labels),
        )
        for prefix, exact in scores["float32"].items()
        for precision, found in scores.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """The report, as Markdown."""
    header = "prefix", "precision", "accuracy", "labels as in float32", "largest score difference"
    return timing.markdown(
        header,
        [
            (
                "whole" if row.prefix is None else f"{row.prefix >> 10} KB",
                row.precision,
                f"{row.accuracy:.4f}",
                f"{row.agree} of {row.documents}",
                f"{row.difference:.5f}",
            )
            for row in rows
        ],
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--checkpoint", type=Path, default=BOOKS)
    parser.add_argument("--limit", type=int, help="documents, the first")
    parser.add_argument("--out", type=Path, default=Path("build/precision"))
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = weights.load(arguments.checkpoint, device=device)
    if checkpoint.config.multi_label:
        parser.error("best labels are compared, and a multi-label model has none")
    names = {label: i for i, label in enumerate(checkpoint.config.labels)}
    documents = list(Splits(arguments.data).read(arguments.split))[: arguments.limit]
    labels = np.array([names[document.label] for document in documents])
    timing.progress(f"{len(documents)} documents")
    tokens = prefixes([document.text.encode() for document in documents], checkpoint.tokenizer)
    scores = {}
    for precision in ("float32", "bfloat16", "fp8") if device.type == "cuda" else ("float32",):
        timing.progress(precision)
        scores[precision] = asyncio.run(read(make(checkpoint.classifier, precision), tokens))
    rows = compared(scores, labels)
    results = {"machine": timing.machine(device), "rows": [asdict(row) for row in rows]}
    timing.save(arguments.out, "precision", results, table(rows))
    print(timing.machine_line(device) + table(rows))


if __name__ == "__main__":
    main()
