"""What the engine adds to the bare step, and what it guarantees beside it.

    python -m benchmarks.engine                     a random model of 4 layers of 256
    python -m benchmarks.engine --checkpoint PATH
    python -m benchmarks.engine --study             tokens a second and latency of several grids

Prints Markdown. Each comparison is made within one run, its sides taking turns, and medians are
shown: what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Self

import numpy as np
import torch

from benchmarks.random_models import REALISTIC, TINY, random_classifier
from gma.model import weights
from gma.model.classifier import Classifier
from gma.model.grid import Grid
from gma.service.engine.engine import Engine
from gma.service.engine.observer import Observer
from gma.service.engine.opening import Opening, Tokens
from gma.service.engine.step import Batch, Launched, Runner
from gma.service.observe.memory import resident_memory
from gma.service.runners.torch import TorchRunner

BOOKS = (17, 22, 9, 31, 14, 26, 12, 40, 19, 8, 24, 35, 11, 28, 16, 21)
"""Lengths of the books read at once, as shares of all tokens."""
SHORT_TOKENS = 500  # 2 KB
LONG_TOKENS = 2_500_000  # 10 MB
FEED_TOKENS = 16_384

ROUND_S = 1.0
"""A turn of `speeds` repeats the step until it lasts about this long."""


def random_tokens(runner: Runner, length: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(0, runner.vocab_size, length, dtype=np.int32)


@dataclass(frozen=True)
class Comparison:
    """Medians over rounds. The ratio is a median round's, whose two sides ran back to back."""

    base: float
    other: float
    ratio: float

    @classmethod
    def of(cls, base: Sequence[float], other: Sequence[float]) -> Self:
        ratios = [b / a for a, b in zip(base, other, strict=True)]
        return cls(median(base), median(other), median(ratios))


class Steps(Observer):
    """Remembers how long full steps took."""

    def __init__(self) -> None:
        self.rows = 0
        self.seconds: list[float] = []
        self.steady = asyncio.Event()

    def stepped(self, rows: int, grid_rows: int, tokens: float, seconds: float) -> None:
        self.rows = max(self.rows, grid_rows)
        if rows == self.rows:
            self.seconds.append(seconds)
            if len(self.seconds) == 3:
                self.steady.set()


@asynccontextmanager
async def running(runner: Runner, observer: Observer | None = None) -> AsyncIterator[Engine]:
    engine = Engine(
        runner, max_waiting=256, inbox_tokens=65_536, idle_timeout_s=60, observer=observer
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def read(engine: Engine, name: str, tokens: Tokens) -> list[tuple[float, int]]:
    """Feed a document as a client would: when progress came, and the tokens read by then."""
    last = len(tokens) <= FEED_TOKENS
    document = engine.open(Opening(name, tokens[:FEED_TOKENS], last, evidence=True, running=True))

    async def feed() -> None:
        for offset in range(FEED_TOKENS, len(tokens), FEED_TOKENS):
            piece = tokens[offset : offset + FEED_TOKENS]
            await document.feed(piece, offset + FEED_TOKENS >= len(tokens))

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(feed())
            return [(time.perf_counter(), progress.tokens) async for progress in document]
    finally:
        document.close()


def full_batch(runner: Runner) -> Batch:
    """A step of as many documents as rows, all rows full."""
    grid = runner.grids[-1]
    batch = Batch.blank(grid, runner.slots)
    batch.tokens[:] = random_tokens(runner, batch.tokens.size).reshape(grid)
    batch.lengths[:] = grid.chunk
    batch.document_of_row[:] = batch.slot_of_document[:] = np.arange(grid.rows)
    return batch


def run_steps(runner: Runner, steps: int) -> float:
    """Seconds of so many bare steps of the full grid, as many in flight as the runner takes."""
    batch = full_batch(runner)
    in_flight: deque[Launched] = deque()
    began = time.perf_counter()
    for _ in range(steps):
        if len(in_flight) == runner.depth:
            in_flight.popleft().outcome()
        in_flight.append(runner.launch(batch))
    for step in in_flight:
        step.outcome()
    return time.perf_counter() - began


def speeds(runners: Mapping[str, Runner], rounds: int) -> dict[str, list[float]]:
    """Measure tokens a second of full steps, by name: the runners take turns, one in each round."""
    steps = {name: max(1, int(ROUND_S / run_steps(x, 1))) for name, x in runners.items()}
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds):
        for name in sorted(runners, reverse=turn % 2 == 0):
            rows, chunk = runners[name].grids[-1]
            seconds = run_steps(runners[name], steps[name])
            taken[name].append(steps[name] * rows * chunk / seconds)
    return taken


async def throughput(runner: Runner, tokens: int, rounds: int) -> Comparison:
    """Tokens a second of the bare step, and of the engine with 16 books at once."""
    lengths = [max(1, share * tokens // sum(BOOKS)) for share in BOOKS]
    books = [random_tokens(runner, length, seed) for seed, length in enumerate(lengths)]
    grid = runner.grids[-1]
    steps = -(-sum(lengths) // (grid.rows * grid.chunk))
    bare, engines = [], []
    async with running(runner) as engine:
        for _ in range(rounds):
            seconds = await asyncio.to_thread(run_steps, runner, steps)
            bare.append(steps * grid.rows * grid.chunk / seconds)
            began = time.perf_counter()
            await asyncio.gather(*(read(engine, str(i), book) for i, book in enumerate(books)))
            engines.append(sum(lengths) / (time.perf_counter() - began))
    return Comparison.of(bare, engines)


async def fairness(runner: Runner, documents: int) -> Comparison:
    """Seconds of a full step while four books are read, and of a short document beside them."""
    steps = Steps()
    full_steps, latencies = [], []
    async with running(runner, steps) as engine:
        books = [
            asyncio.create_task(read(engine, f"book {i}", random_tokens(runner, LONG_TOKENS, i)))
            for i in range(4)
        ]
        await steps.steady.wait()
        for i in range(documents):
            began = time.perf_counter()
            await read(engine, "short", random_tokens(runner, SHORT_TOKENS, i))
            latencies.append(time.perf_counter() - began)
            full_steps.append(median(steps.seconds[-9:]))
            # Not in step with the engine's steps.
            await asyncio.sleep(full_steps[-1] * (i % 7) / 7)
        for book in books:
            book.cancel()
        await asyncio.gather(*books, return_exceptions=True)
    return Comparison.of(full_steps, latencies)


async def flatness(runner: Runner, rounds: int) -> Comparison:
    """Seconds a token of the first and of the last tenth of a long document.

    Each last tenth is compared with the first of the next round, which follows it at once.
    """
    tenth = LONG_TOKENS // 10
    first, last = [], []
    async with running(runner) as engine:
        for _ in range(rounds + 1):
            came = await read(engine, "long", random_tokens(runner, LONG_TOKENS))
            first.append(seconds_a_token(came, 0, tenth))
            last.append(seconds_a_token(came, LONG_TOKENS - tenth, LONG_TOKENS))
    return Comparison.of(first[1:], last[:-1])


def seconds_a_token(came: Sequence[tuple[float, int]], start: int, end: int) -> float:
    """Median over the steps that read the tokens from `start` to `end`."""
    within = [(at, tokens) for at, tokens in came if start <= tokens <= end]
    return median((b[0] - a[0]) / (b[1] - a[1]) for a, b in pairwise(within))


async def peak_memory(runner: Runner) -> tuple[int, int]:
    """This process's peak resident bytes after a 200 KB document, and after one of 20 MB."""
    peaks = []
    async with running(runner) as engine:
        for length in (50_000, 5_000_000):
            await read(engine, "document", np.broadcast_to(np.int32(7), length))  # takes no memory
            peaks.append(resident_memory()[1])
    return peaks[0], peaks[1]


def study(classifier: Classifier, rounds: int) -> None:
    """Full steps of several grids, and the 1-row step that a lone short document takes."""
    grids = [Grid(rows, chunk) for rows in (1, 4, 8, 16) for chunk in (128, 256, 512)]
    runners = {
        grid: TorchRunner(classifier, slots=16, rows=grid.rows, chunk=grid.chunk) for grid in grids
    }
    seconds: dict[Grid, list[float]] = {grid: [] for grid in grids}
    for _ in range(rounds + 1):
        for grid in grids:
            seconds[grid].append(run_steps(runners[grid], 1))
    print("| rows | chunk | tokens/s | ms a step | ms a 1-row step |")
    print("|---|---|---|---|---|")
    step = {grid: median(times[1:]) for grid, times in seconds.items()}
    for grid in grids[3:]:
        print(
            f"| {grid.rows} | {grid.chunk} | {grid.rows * grid.chunk / step[grid]:,.0f} "
            f"| {step[grid] * 1e3:.1f} | {step[Grid(1, grid.chunk)] * 1e3:.1f} |"
        )


def report(classifier: Classifier, arguments: argparse.Namespace) -> None:
    options = {"rows": arguments.rows, "chunk": arguments.chunk, "compile": arguments.compile}
    tiny = TorchRunner(random_classifier(TINY), slots=64, **options)
    runner = TorchRunner(classifier, slots=64, **options)
    small, large = asyncio.run(peak_memory(tiny))
    speed = asyncio.run(throughput(runner, arguments.tokens, arguments.rounds))
    fair = asyncio.run(fairness(runner, 7 * arguments.rounds))
    flat = asyncio.run(flatness(tiny, arguments.rounds))
    for row in (
        ("figure", "value", "target"),
        ("---", "---", "---"),
        (f"bare step, {arguments.rows} x {arguments.chunk}", f"{speed.base:,.0f} tokens/s", ""),
        ("engine, 16 books at once", f"{speed.other:,.0f} tokens/s", ""),
        ("engine / bare step", f"{speed.ratio:.3f}", ">= 0.85"),
        ("full step, four books in flight", f"{fair.base * 1e3:.1f} ms", ""),
        ("2 KB document beside them", f"{fair.other * 1e3:.1f} ms", ""),
        ("in steps", f"{fair.ratio:.2f}", "<= 4"),
        ("a token of a 10 MB document's first tenth (tiny model)", f"{flat.base * 1e6:.3f} us", ""),
        ("of its last tenth", f"{flat.other * 1e6:.3f} us", ""),
        ("last / first", f"{flat.ratio:.3f}", "0.95 to 1.05"),
        ("peak resident memory, 200 KB document (tiny model)", f"{small / 2**20:.1f} MiB", ""),
        ("20 MB document", f"{large / 2**20:.1f} MiB", ""),
        ("20 MB / 200 KB", f"{large / small:.3f}", "<= 1.05"),
    ):
        print(f"| {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, help="a model's folder; by default a random one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tokens", type=int, default=100_000, help="of all 16 books together")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--study", action="store_true", help="compare grids instead")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    classifier = (
        weights.load(arguments.checkpoint, device=arguments.device).classifier
        if arguments.checkpoint
        else random_classifier(REALISTIC).to(arguments.device)
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}\n")
    if arguments.study:
        study(classifier, arguments.rounds)
    else:
        report(classifier, arguments)


if __name__ == "__main__":
    main()
