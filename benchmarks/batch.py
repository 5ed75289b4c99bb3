"""What `gma batch` reads in a second, against the bare step.

    python -m benchmarks.batch --data BOOKS              whole books of the test split, in rounds
    python -m benchmarks.batch --data BOOKS --shorts 400 with so many pieces of 2 KB in each round
    python -m benchmarks.batch --quick                   made-up texts and a tiny model

Each round is a batch from JSON Lines to Parquet, its model loaded and its parts cut before; full
steps of the same runner are run alone before and after. What else the machine does falls on both;
the last column counts seconds of this process's CPU in place of time. Prints Markdown. As `gma` has
it, set OMP_WAIT_POLICY=PASSIVE.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.checkpoints import BOOKS
from benchmarks.engine import run_steps
from benchmarks.random_models import tiny_checkpoint
from gma.model.training.splits import Splits
from gma.service.batch.batch import Batch
from gma.service.batch.manifest import Options
from gma.service.batch.reader import Reader
from gma.service.batch.work import Done
from gma.service.runners.loading import load
from gma.service.settings import Settings

SHORT_CHARACTERS = 2000

SENTENCE = "The sea was calm, and nobody spoke of it. "


@dataclass(frozen=True)
class Round:
    """One turn of each side."""

    documents: int
    bytes: int
    tokens: int
    bare: float
    """Tokens a second of full steps, before and after."""
    batch: float
    of_cpu: float
    """The ratio of the two by seconds of CPU, of which other work takes none."""

    @property
    def ratio(self) -> float:
        return self.batch / self.bare


class Speed(NamedTuple):
    """Tokens a second."""

    of_time: float
    of_cpu: float


@contextmanager
def timed(tokens: Callable[[], int]) -> Iterator[Callable[[], Speed]]:
    """Measures what is done within; the speed is there afterwards."""
    began, began_cpu = time.perf_counter(), time.process_time()
    found: list[Speed] = []
    yield lambda: found[0]
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    found.append(Speed(tokens() / seconds, tokens() / cpu))


def books(data: Path, count: int, rounds: int, shorts: int) -> list[list[str]]:
    """Books of the test split, so many for each round, with pieces of theirs among them."""
    texts = [document.text for document in Splits(data).read("test")]
    random.Random(0).shuffle(texts)
    return [mixed(texts[n * count : (n + 1) * count], shorts) for n in range(rounds)]


def mixed(texts: Sequence[str], shorts: int) -> list[str]:
    """Texts and so many pieces of them, in any order."""
    drawn = random.Random(len(texts))
    pieces = []
    for _ in range(shorts):
        text = drawn.choice(texts)
        start = drawn.randrange(max(1, len(text) - SHORT_CHARACTERS))
        pieces.append(text[start : start + SHORT_CHARACTERS])
    found = [*texts, *pieces]
    drawn.shuffle(found)
    return found


async def measure(
    rounds: Sequence[Sequence[str]], settings: Settings, part_bytes: int, bare_s: float
) -> list[Round]:
    """Read each round's texts, after steps that take so many seconds."""
    loaded = load(settings)
    runner = loaded.runner
    grid = runner.grids[-1]
    found = []

    async def bare(steps: int) -> Speed:
        with timed(lambda: steps * grid.rows * grid.chunk) as speed:
            await asyncio.to_thread(run_steps, runner, steps)
        return speed()

    with tempfile.TemporaryDirectory(prefix="gma-") as folder:
        async with Reader(settings, loaded) as reader:
            tokens_of_time = (await bare(3)).of_time * bare_s
            steps = max(1, int(tokens_of_time / grid.rows / grid.chunk))
            before = await bare(steps)
            for number, texts in enumerate(rounds):
                file = Path(folder) / f"{number}.jsonl"
                lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
                file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
                out = str(Path(folder) / f"answers-{number}")
                batch = Batch([str(file)], out, settings, Options(part_bytes=part_bytes))
                done = Done()
                with timed(lambda: done.tokens) as speed:  # noqa: B023 (called within)
                    done = await batch.read(reader)
                batch.finish(done)
                if done.errors or done.documents != len(texts):
                    raise SystemExit(f"{done} of {len(texts)} texts: not all were read")
                after = await bare(steps)
                alone = Speed(*(sum(pair) / 2 for pair in zip(before, after, strict=True)))
                read = speed()
                share = read.of_cpu / alone.of_cpu
                found.append(
                    Round(
                        done.documents, done.bytes, done.tokens, alone.of_time, read.of_time, share
                    )
                )
                before = after
    return found


def table(rounds: Sequence[Round]) -> str:
    """The report, as Markdown; the last row has medians."""
    lines = ["| texts | MB | tokens | bare step, tokens/s | gma batch, tokens/s | ratio | of CPU |"]
    lines.append("|---|---|---|---|---|---|---|")
    lines += [
        f"| {each.documents:,} | {each.bytes / 1e6:.1f} | {each.tokens:,} | {each.bare:,.0f} "
        f"| {each.batch:,.0f} | {each.ratio:.3f} | {each.of_cpu:.3f} |"
        for each in rounds
    ]
    bare, batch, ratio, of_cpu = (
        median(getattr(each, name) for each in rounds)
        for name in ("bare", "batch", "ratio", "of_cpu")
    )
    last = f"| median | | | {bare:,.0f} | {batch:,.0f} | {ratio:.3f} | {of_cpu:.3f} |"
    return "\n".join([*lines, last])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the books")
    parser.add_argument("--checkpoint", type=Path, default=BOOKS)
    parser.add_argument("--documents", type=int, default=16, help="books of a round")
    parser.add_argument("--shorts", type=int, default=0, help="pieces of 2 KB in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=0, help="of a step; 0 as the service has")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--part-bytes", type=int, default=Options().part_bytes)
    parser.add_argument("--bare-seconds", type=float, default=15.0)
    parser.add_argument("--quick", action="store_true", help="made-up texts and a tiny model")
    arguments = parser.parse_args(argv)
    given = {"device": arguments.device, "rows": arguments.rows, "sessions": None}
    with tempfile.TemporaryDirectory(prefix="gma-") as folder:
        if arguments.quick:
            tiny_checkpoint(Path(folder))
            rounds = [mixed([SENTENCE * 200] * 4, 8)] * 2
            settings = Settings.load(checkpoint=Path(folder), **given)
            bare_s = 0.1
        elif arguments.data is None:
            parser.error("--data is needed, or --quick")
        else:
            rounds = books(arguments.data, arguments.documents, arguments.rounds, arguments.shorts)
            settings = Settings.load(checkpoint=arguments.checkpoint, **given)
            bare_s = arguments.bare_seconds
        found = asyncio.run(measure(rounds, settings, arguments.part_bytes, bare_s))
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {settings.checkpoint.name}\n")
    print(table(found))


if __name__ == "__main__":
    main()
