"""Both directions against length: time, memory, and what a short document waits beside a long one.

    python -m benchmarks.directions                            4 layers of 256, up to 65,536 tokens
    python -m benchmarks.directions --tiny --longest 4194304   one layer of 16
    python -m benchmarks.directions --device cuda --rows 64 --chunk 512 --longest 4194304

Prints Markdown. The causal model and the bidirectional one have the same sizes and weights drawn
alike, and are measured one after the other, on a machine that should do nothing else. Memory is
what the process has more than before its first document. On a CPU that is what is resident, where
pages count once they are used. On a GPU it is the most that torch allocated; all pages are taken at
the start there, so the document's are added. Tokens, which are on the host, do not count. Lengths
ascend, each a document that is alone.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.engine import SHORT_TOKENS, Steps, random_tokens, read, running
from benchmarks.random_models import REALISTIC, TINY, random_classifier
from benchmarks.timing import tokens_name
from gma.model.config import ModelConfig
from gma.service.engine.engine import Engine
from gma.service.engine.step import Runner
from gma.service.observe.memory import Memory
from gma.service.runners.passes import PassRunner
from gma.service.runners.torch import TorchRunner

SHORTEST = 4096
DIRECTIONS = ("causal", "bidirectional")


class Alone(NamedTuple):
    """One document that was read alone."""

    seconds: float
    grown: int
    """Bytes, since before the first."""


class Beside(NamedTuple):
    """Short documents beside a long one, in seconds."""

    median: float
    worst: float


class Peak(Steps):
    """The most memory that a runner had at the end of a step."""

    def __init__(self, runner: Runner) -> None:
        super().__init__()
        self.most = 0
        self._runner = runner

    def stepped(self, rows: int, grid_rows: int, tokens: float, seconds: float) -> None:
        super().stepped(rows, grid_rows, tokens, seconds)
        self.most = max(self.most, used(self._runner.memory()))


def used(memory: Memory) -> int:
    return memory.device_peak or memory.resident


def runner_of(config: ModelConfig, direction: str, arguments: argparse.Namespace) -> Runner:
    """A runner whose pages hold the longest document, and those of short ones."""
    classifier = random_classifier(config.model_copy(update={"causal": direction == "causal"}))
    classifier = classifier.to(arguments.device)
    classifier.choose_mixers()
    rows, chunk = arguments.rows, arguments.chunk
    if direction == "causal":
        compiled = arguments.device == "cuda"
        return TorchRunner(classifier, slots=64, rows=rows, chunk=chunk, compile=compiled)
    memory = (-(-arguments.longest // chunk) * 8 // 7 + 8) * page_bytes(config, chunk)
    return PassRunner(
        classifier,
        slots=64,
        page_memory=memory,
        rows=rows,
        chunk=chunk,
        compile=arguments.device == "cuda",
    )


def page_bytes(config: ModelConfig, tokens: int) -> int:
    """What so many tokens take of a page, in float32."""
    return 4 * config.width * tokens


async def alone(
    engine: Engine, runner: Runner, peak: Peak, length: int, before: int, page: int
) -> Alone:
    """`page`: bytes of a page."""
    peak.most = 0
    tokens = random_tokens(runner, length)
    began = time.perf_counter()
    await read(engine, "alone", tokens)
    seconds = time.perf_counter() - began
    if runner.device == "cpu":
        return Alone(seconds, peak.most - before - tokens.nbytes)
    pages = -(-length // runner.grids[-1].chunk) if runner.pages else 0
    return Alone(seconds, peak.most - before + pages * page)


async def beside(engine: Engine, runner: Runner, peak: Peak, length: int, shorts: int) -> Beside:
    """Read short documents one after the other while a long one is read, again if it ends."""

    async def read_on() -> None:
        while True:
            await read(engine, "long", random_tokens(runner, length))

    peak.steady.clear()
    peak.seconds.clear()
    long = asyncio.create_task(read_on())
    await peak.steady.wait()
    seconds = []
    for i in range(shorts):
        began = time.perf_counter()
        await read(engine, "short", random_tokens(runner, SHORT_TOKENS, i))
        seconds.append(time.perf_counter() - began)
        # Not in step with the engine's steps.
        await asyncio.sleep(peak.seconds[-1] * (i % 7) / 7)
    long.cancel()
    await asyncio.gather(long, return_exceptions=True)
    return Beside(median(seconds), float(np.quantile(seconds, 0.95)))


async def measured(config: ModelConfig, arguments: argparse.Namespace) -> None:
    """Print what both directions take."""
    lengths = [SHORTEST]
    while 4 * lengths[-1] <= arguments.longest:
        lengths.append(4 * lengths[-1])
    directions = DIRECTIONS if arguments.only is None else (arguments.only,)
    runners = {direction: runner_of(config, direction, arguments) for direction in directions}
    found: dict[tuple[str, int], Alone] = {}
    waits: dict[str, Beside] = {}
    page = page_bytes(config, arguments.chunk)
    for direction, runner in runners.items():
        peak = Peak(runner)
        async with running(runner, peak) as engine:
            await read(engine, "first", random_tokens(runner, 2 * arguments.rows * arguments.chunk))
            before = used(runner.memory())
            for length in lengths:
                found[direction, length] = await alone(engine, runner, peak, length, before, page)
            waits[direction] = await beside(engine, runner, peak, lengths[-1], arguments.shorts)
    table(
        "million tokens/s", directions, lengths, lambda d, n: f"{n / found[d, n].seconds / 1e6:.3f}"
    )
    table(
        "memory that the document adds, MB",
        directions,
        lengths,
        lambda d, n: f"{found[d, n].grown / 1e6:,.1f}",
    )
    table("of it a token, bytes", directions, lengths, lambda d, n: f"{found[d, n].grown / n:,.0f}")
    print(f"\n| {SHORT_TOKENS} tokens beside {tokens_name(lengths[-1])}, ms | median | p95 |")
    print("|---|---|---|")
    for direction, wait in waits.items():
        print(f"| {direction} | {wait.median * 1e3:.1f} | {wait.worst * 1e3:.1f} |")
    pages = sum(runner.pages for runner in runners.values())
    print(
        f"\nA token's share of a page: {page_bytes(config, 1)} bytes. "
        f"All pages: {pages * page / 1e6:,.0f} MB."
    )


def table(
    title: str, directions: Sequence[str], lengths: list[int], cell: Callable[[str, int], str]
) -> None:
    print(f"\n| {title} | {' | '.join(map(tokens_name, lengths))} |")
    print("|---" * (len(lengths) + 1) + "|")
    for direction in directions:
        print(f"| {direction} | {' | '.join(cell(direction, length) for length in lengths)} |")


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--longest", type=int, default=65_536, help="tokens")
    parser.add_argument("--shorts", type=int, default=50, help="short documents beside it")
    parser.add_argument("--tiny", action="store_true", help="one layer of 16")
    parser.add_argument("--layers", type=int, help="of the model")
    parser.add_argument("--form", choices=("paper", "forgetting"), default="forgetting")
    parser.add_argument(
        "--only", choices=DIRECTIONS, help="on a GPU: both are compiled, which takes a process each"
    )
    arguments = parser.parse_args(given)
    config = (TINY if arguments.tiny else REALISTIC).model_copy(update={"form": arguments.form})
    if arguments.layers:
        config = config.model_copy(update={"layers": arguments.layers})
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}; "
        f"{config.layers} layers of {config.width}, {config.form}; "
        f"{arguments.rows} x {arguments.chunk}"
    )
    asyncio.run(measured(config, arguments))


if __name__ == "__main__":
    main()
