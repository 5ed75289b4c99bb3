"""The service over HTTP beside the bare step of its runner, all on the machine where this runs.

    python -m benchmarks.service --data BOOKS             the checkpoint books
    python -m benchmarks.service --data BOOKS --random    a random one, 12 layers of 768
    GMA_GATEWAYS=4 python -m benchmarks.service ...       any setting, as for `gma serve`

First the bare step, in a process that ends before the service starts. Then documents of 512 tokens
alone; then books, so many in flight at any time; then such documents at random times beside them,
timed from when they were due. Tokens are those that answers tell. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.checkpoints import BOOKS
from benchmarks.clients import Answered, Clients, poisson_times, tokens_within
from benchmarks.processes import Service, cpu_seconds, service
from gma.loadtest import server
from gma.model.tokenizer import Tokenizer
from gma.model.training.splits import Splits

SHORT_TOKENS = 512
BARE_S, BARE_ROUNDS = 2.0, 3


def progress(message: str) -> None:
    print(time.strftime("%H:%M:%S"), message, file=sys.stderr, flush=True)


class Bare(NamedTuple):
    """The runner's full step, repeated back to back."""

    rows: int
    chunk: int
    seconds: float
    device: str
    dtype: str

    @property
    def tokens_per_s(self) -> float:
        return self.rows * self.chunk / self.seconds


@dataclass(frozen=True)
class Window:
    """What happened between two moments under load."""

    seconds: float
    tokens: float  # of the answers
    steps: float
    step_s: float  # mean
    fill: float  # tokens read, of those that the steps' grids could have
    cores: dict[str, float]  # busy, by role


@dataclass(frozen=True)
class Results:
    bare: Bare
    load: Window
    beside: Window  # while short documents came too
    alone: list[float]  # seconds of each short document
    under_load: list[float]
    short_tokens: float  # mean
    timing_ms: dict[str, float]  # of those under load, as their answers tell it, mean

    @property
    def ratio(self) -> float:
        return self.load.tokens / self.load.seconds / self.bare.tokens_per_s


def random_checkpoint(folder: Path) -> None:
    """Save a random model that has the tokenizer and labels of `books`."""
    import torch

    from benchmarks.models import SIZE
    from gma.model import weights
    from gma.model.classifier import Classifier

    torch.manual_seed(0)
    default = weights.load(BOOKS)
    config = default.config.model_copy(update={"name": "random", **SIZE})
    classifier = Classifier(config).requires_grad_(False)
    weights.save(folder, classifier, default.tokenizer, card="# A random model\n")


def bare_step(checkpoint: Path, budget_s: float) -> Bare:
    """The runner that a worker would take, with as many steps in flight; a median of rounds."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `gma` does, before torch is imported
    import torch

    from benchmarks.engine import run_steps
    from gma.model import weights
    from gma.service.runners.loading import torch_runner
    from gma.service.settings import Settings

    settings = Settings.load(checkpoint=checkpoint)
    torch.set_num_threads(settings.threads or os.cpu_count() or 1)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    runner = torch_runner(weights.load(checkpoint, device=device).classifier, settings)
    runner.warm_up()
    steps = max(2, round(budget_s / (run_steps(runner, 4) / 4)))
    seconds = median(run_steps(runner, steps) / steps for _ in range(BARE_ROUNDS))
    named = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores"
    return Bare(*runner.grids[-1], seconds, named, runner.dtype)


def short_texts(books: Sequence[bytes], tokenizer: Tokenizer, number: int) -> list[bytes]:
    """Excerpts that begin with a word and have a few tokens less than a short row holds."""
    rng = random.Random(0)
    texts: list[bytes] = []
    while len(texts) < number:
        book = rng.choice(books)
        start = book.find(b" ", rng.randrange(max(1, len(book) - 8 * SHORT_TOKENS)))
        excerpt = book[start : start + 8 * SHORT_TOKENS].decode(errors="ignore")
        lengths = tokenizer.byte_lengths[tokenizer.encode(excerpt)]
        end = int(lengths[: SHORT_TOKENS - 4].sum())
        if len(lengths) >= SHORT_TOKENS:
            texts.append(excerpt.encode()[:end].decode(errors="ignore").encode())
    return texts


class Reading(NamedTuple):
    """The service's counters at one moment."""

    at: float
    counters: dict[str, float]
    cpu: dict[str, float]

    @classmethod
    def take(cls, running: Service, at: float) -> Reading:
        time.sleep(max(0.0, at - time.monotonic()))
        cpu = cpu_seconds(os.getpid())  # the service's and the clients'
        told = server.scrape(running.url)
        assert told
        return cls(time.monotonic(), told.sums, cpu)


def window(a: Reading, b: Reading, answers: Sequence[Answered], chunk: int) -> Window:
    """What happened between two readings."""
    passed = b.at - a.at
    counted = {name: value - a.counters.get(name, 0) for name, value in b.counters.items()}
    steps = counted["gma_step_seconds_count"]
    return Window(
        seconds=passed,
        tokens=tokens_within(answers, a.at, b.at),
        steps=steps,
        step_s=counted["gma_step_seconds_sum"] / steps,
        fill=counted["gma_tokens_total"] / (counted["gma_step_grid_rows_total"] * chunk),
        cores={role: (spent - a.cpu.get(role, 0)) / passed for role, spent in b.cpu.items()},
    )


def measure(arguments: argparse.Namespace, checkpoint: Path) -> Results:
    """Measure the bare step, then the service."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as apart:
        bare = apart.submit(bare_step, checkpoint, arguments.bare_seconds).result()
    progress(f"bare step: {bare.seconds * 1e3:.2f} ms, {bare.tokens_per_s:,.0f} tokens/s")
    books = [document.text.encode() for document in Splits(arguments.data).read(arguments.split)]
    books = [book[: arguments.book_bytes] for book in books]
    tokenizer = Tokenizer.load(checkpoint / "tokenizer.json")
    texts = short_texts(books, tokenizer, arguments.short)
    with (
        Clients(arguments.clients) as clients,
        service(arguments.log, checkpoint=checkpoint) as running,
    ):
        url = f"{running.url}/v1"
        clients.one_by_one(url, texts[:10])  # what is slow only once
        alone = clients.one_by_one(url, texts)
        progress(f"alone: median {median(answer.seconds for answer in alone) * 1e3:.1f} ms")
        begin = time.monotonic() + arguments.warm
        middle, end = begin + arguments.seconds, begin + arguments.seconds + arguments.beside
        loads = clients.books(url, books, arguments.books, end)
        dues = poisson_times(middle, end, len(texts))
        shorts = clients.at(url, texts, dues)
        readings = [Reading.take(running, at) for at in (begin, middle, end)]
        under_load = shorts.result()
        answers = [answer for load in loads for answer in load.result()] + under_load
    first, second = (window(a, b, answers, bare.chunk) for a, b in pairwise(readings))
    return Results(
        bare,
        first,
        second,
        [answer.seconds for answer in alone],
        [answer.seconds for answer in under_load],
        float(np.mean([answer.tokens for answer in under_load])),
        {
            name: float(np.mean([answer.timing_ms[name] for answer in under_load]))
            for name in under_load[0].timing_ms
        },
    )


def table(results: Results, books: int) -> str:
    """The report, as Markdown."""
    bare, load, beside = results.bare, results.load, results.beside
    alone, under_load = (
        np.percentile(seconds, [50, 99]) * 1e3 for seconds in (results.alone, results.under_load)
    )
    short = f"document of {results.short_tokens:.0f} tokens"
    lines = [
        ("figure", "value", "asked for"),
        ("---", "---", "---"),
        (
            f"bare step, {bare.rows} x {bare.chunk}, {bare.dtype}",
            f"{bare.seconds * 1e3:.2f} ms",
            "",
        ),
        ("bare step", f"{bare.tokens_per_s:,.0f} tokens/s", ""),
        (
            f"HTTP, {books} books at once, {load.seconds:.0f} s",
            f"{load.tokens / load.seconds:,.0f} tokens/s",
            "",
        ),
        ("HTTP / bare step", f"{results.ratio:.3f}", "at least .85"),
        ("mean step under load", f"{load.step_s * 1e3:.2f} ms", ""),
        ("time in steps", f"{load.step_s * load.steps / load.seconds:.3f}", ""),
        ("the steps' grids filled", f"{load.fill:.3f}", ""),
        (f"{short} alone, p50 / p99", f"{alone[0]:.1f} / {alone[1]:.1f} ms", ""),
        ("beside the books, p50 / p99", f"{under_load[0]:.1f} / {under_load[1]:.1f} ms", ""),
        ("p99 in bare steps", f"{under_load[1] / bare.seconds / 1e3:.2f}", "at most 4"),
        ("p99 in mean steps then", f"{under_load[1] / beside.step_s / 1e3:.2f}", ""),
    ]
    lines += [(f"of it {name}, mean", f"{ms:.1f} ms", "") for name, ms in results.timing_ms.items()]
    busy = sorted(load.cores.items(), key=lambda item: -item[1])
    lines += [(f"cores busy, {role}", f"{cores:.2f}", "") for role, cores in busy if cores > 0.02]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


QUICK: dict[str, Any] = {
    "books": 4, "book_bytes": 60_000, "clients": 1, "seconds": 10.0, "beside": 10.0, "warm": 4.0,
    "short": 20, "bare_seconds": 1.0,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", type=Path, default=BOOKS)
    which.add_argument("--random", action="store_true", help="a random model of 12 layers of 768")
    parser.add_argument("--out", type=Path, default=Path("build/service"))
    parser.add_argument("--books", type=int, default=64, help="in flight at any time")
    parser.add_argument("--book-bytes", type=int, help="of each, at most")
    parser.add_argument("--clients", type=int, default=4, help="processes that send books")
    parser.add_argument("--seconds", type=float, default=20.0, help="of books alone")
    parser.add_argument("--beside", type=float, default=20.0, help="of short documents beside them")
    parser.add_argument("--warm", type=float, default=6.0, help="seconds of load before that")
    parser.add_argument("--short", type=int, default=400, help="short documents")
    parser.add_argument("--bare-seconds", type=float, default=BARE_S, help="each of 3 rounds")
    parser.add_argument("--quick", action="store_true", help="small: shows that it runs, no more")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        vars(arguments).update(QUICK)
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.log = arguments.out / "service.log"
    with ExitStack() as stack:
        checkpoint = arguments.checkpoint
        if arguments.random:
            checkpoint = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gma-")))
            random_checkpoint(checkpoint)
        results = measure(arguments, checkpoint.absolute())
    save(arguments.out, results, table(results, arguments.books))


def save(folder: Path, results: Results, found: str) -> None:
    """Write service.json and service.md, and print the table."""
    from benchmarks import timing

    settings = {name: value for name, value in os.environ.items() if name.startswith("GMA_")}
    kept = {"cores": os.cpu_count(), "settings": settings, "ratio": results.ratio}
    timing.save(folder, "service", kept | asdict(results), found)
    print(f"{results.bare.device}, {os.cpu_count()} cores, {settings or 'default settings'}\n")
    print(found)


if __name__ == "__main__":
    main()
