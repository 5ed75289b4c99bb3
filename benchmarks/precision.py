"""What a checkpoint gains and loses in lower precision: speed, and answers to a split's documents.

    python -m benchmarks.precision --data BOOKS
    python -m benchmarks.precision --data BOOKS --limit 20      the first documents only
    python -m benchmarks.precision --data BOOKS --bytes 16384   their first bytes only
    python -m benchmarks.precision --device cpu --threads 2     speed alone

Every precision has its own runner, as the service has it: float32 in PyTorch; on a GPU bfloat16 and
fp8 in the fused kernels; on a CPU bfloat16 and int8 if it has the instructions. Full steps take
turns within one run, and all read the same tokens through the engine. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import os

# As the command `gma` has it, and for the same reason as in benchmarks.backends.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import timing
from benchmarks.checkpoints import BOOKS
from benchmarks.engine import Comparison, running, speeds
from gma.model import weights
from gma.model.classifier import Classifier
from gma.model.config import ModelConfig
from gma.model.products import Precision, obstacle
from gma.model.scores import labels_of
from gma.model.tokenizer import Tokenizer
from gma.model.training.corpus import indices, matrix
from gma.model.training.evaluation import figures_of
from gma.model.training.figures import Labels
from gma.model.training.splits import Splits
from gma.model.weights import Checkpoint
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
    figure: float  # accuracy, or a multi-label model's micro-F1
    agree: int  # documents whose labels are float32's
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
    runner: Runner, documents: dict[int | None, list[Tokens]], *, multi_label: bool = False
) -> dict[int | None, Scores]:
    """Every document's scores: many documents at once, one prefix after the other."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(engine: Engine, name: str, tokens: Tokens) -> Scores:
        async with places:
            opening = Opening(name, tokens, last=True, evidence=False, running=False)
            *_, final = [progress async for progress in engine.open(opening)]
            return scores_of(final.logits, multi_label=multi_label)

    scores = {}
    async with running(runner) as engine:
        for prefix, cut in documents.items():
            reading = (one(engine, str(i), tokens) for i, tokens in enumerate(cut))
            scores[prefix] = np.stack(await asyncio.gather(*reading))
    return scores


def make(classifier: Classifier, precision: str) -> Runner:
    """The service's runner; on a GPU for float32 the one without a compiler, which is as exact."""
    settings = Settings.load(dtype=precision)
    if not classifier.embedding.weight.is_cuda:
        return torch_runner(copy.deepcopy(classifier), settings)  # which is told the precision
    if precision != "float32":
        return torch_runner(classifier, settings)
    rows, chunk = settings.grid(on_gpu=True)
    return TorchRunner(classifier, slots=settings.slots, rows=rows, chunk=chunk)


def precisions(device: torch.device) -> list[str]:
    """Those that are served on a device, float32 first; why others are not is said."""
    if device.type == "cuda":
        return ["float32", "bfloat16", "fp8"]
    served: list[str] = []
    for precision in get_args(Precision):
        if reason := obstacle(precision):
            timing.progress(f"no {precision}: {reason}")
        else:
            served.append(precision)
    return served


def compared(
    scores: Mapping[str, Mapping[int | None, Scores]], labels: Labels, config: ModelConfig
) -> list[Row]:
    """Compare each precision with float32, prefix by prefix; labels (documents, labels)."""
    figure = "micro_f1" if config.multi_label else "accuracy"
    rows = []
    for prefix, exact in scores["float32"].items():
        expected = labels_of(config, torch.from_numpy(exact))
        for precision, found in scores.items():
            given = torch.from_numpy(found[prefix])
            rows.append(
                Row(
                    prefix,
                    precision,
                    figures_of(config, given, labels)[figure],
                    int((labels_of(config, given) == expected).all(1).sum()),
                    float(np.abs(found[prefix] - exact).max()),
                    len(labels),
                )
            )
    return rows


def speed_table(taken: Mapping[str, Sequence[float]]) -> str:
    """Tokens a second of each precision by round, as Markdown."""
    compared = {name: Comparison.of(taken["float32"], each) for name, each in taken.items()}
    return timing.markdown(
        ("full steps in", "tokens/s, median", "against float32, median round"),
        [(name, f"{each.other:,.0f}", f"{each.ratio:.2f}") for name, each in compared.items()],
    )


def table(rows: Sequence[Row], figure: str = "accuracy") -> str:
    """The report, as Markdown."""
    header = "prefix", "precision", figure, "labels as in float32", "largest score difference"
    return timing.markdown(
        header,
        [
            (
                "whole" if row.prefix is None else f"{row.prefix >> 10} KB",
                row.precision,
                f"{row.figure:.4f}",
                f"{row.agree} of {row.documents}",
                f"{row.difference:.5f}",
            )
            for row in rows
        ],
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the splits; without it, speed alone")
    parser.add_argument("--split", default="test")
    parser.add_argument("--checkpoint", type=Path, default=BOOKS)
    parser.add_argument("--limit", type=int, help="documents, the first")
    parser.add_argument("--bytes", type=int, help="of each document, the first; by default several")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; by default every core")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path("build/precision"))
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    checkpoint = weights.load(arguments.checkpoint, device=device)
    runners = {name: make(checkpoint.classifier, name) for name in precisions(device)}
    for name, runner in runners.items():
        timing.progress(f"{name}: {runner.kernels}")
        runner.warm_up()
    taken = speeds(runners, arguments.rounds)
    rows: list[Row] = []
    report = speed_table(taken)
    if arguments.data:
        rows = answers(checkpoint, runners, arguments)
        figure = "micro-F1" if checkpoint.config.multi_label else "accuracy"
        report += "\n" + table(rows, figure)
    results = {
        "machine": timing.machine(device),
        "tokens_per_second": taken,
        "rows": [asdict(row) for row in rows],
    }
    timing.save(arguments.out, "precision", results, report)
    print(timing.machine_line(device) + report)


def answers(
    checkpoint: Checkpoint, runners: Mapping[str, Runner], arguments: argparse.Namespace
) -> list[Row]:
    """What each precision says of the documents of the split."""
    config = checkpoint.config
    documents = list(Splits(arguments.data).read(arguments.split))[: arguments.limit]
    index = {label: i for i, label in enumerate(config.labels)}
    labels = matrix([indices(document, index) for document in documents], len(config.labels))
    tokens = prefixes(
        [document.text.encode() for document in documents],
        checkpoint.tokenizer,
        PREFIXES if arguments.bytes is None else [arguments.bytes],
    )
    scores = {}
    for precision, runner in runners.items():
        timing.progress(f"{precision}: {len(documents)} documents")
        scores[precision] = asyncio.run(read(runner, tokens, multi_label=config.multi_label))
    return compared(scores, labels, config)


if __name__ == "__main__":
    main()
