"""What `gma batch` reads in a second, against the bare step.

    python -m benchmarks.batch --data BOOKS              whole books of the test split, in rounds
    python -m benchmarks.batch --data BOOKS --shorts 400 with so many pieces of 2 KB in each round
    python -m benchmarks.batch --quick                   made-up texts and a tiny model

Each round runs full steps alone, then a batch from JSON Lines to Parquet with the same runner, its
model loaded and its parts cut before. What else the machine does falls on both. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.checkpoints import BOOKS
from benchmarks.engine import run_steps
from benchmarks.random_models import tiny_checkpoint
from gma.model.training.splits import Splits
from gma.service.batch.batch import Batch
from gma.service.batch.manifest import Options
from gma.service.batch.reader import Reader
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
    """Tokens a second of full steps."""
    batch: float

    @property
    def ratio(self) -> float:
        return self.batch / self.bare


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
    with tempfile.TemporaryDirectory(prefix="gma-") as folder:
        async with Reader(settings, loaded) as reader:
            steps = max(1, int(bare_s / await asyncio.to_thread(run_steps, runner, 3) * 3))
            for number, texts in enumerate(rounds):
                file = Path(folder) / f"{number}.jsonl"
                lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
                file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
                out = str(Path(folder) / f"answers-{number}")
                batch = Batch([str(file)], out, settings, Options(part_bytes=part_bytes))
                seconds = await asyncio.to_thread(run_steps, runner, steps)
                began = time.perf_counter()
                done = await batch.read(reader)
                ended = time.perf_counter()
                batch.finish(done)
                if done.errors or done.documents != len(texts):
                    raise SystemExit(f"{done} of {len(texts)} texts: not all were read")
                bare = steps * grid.rows * grid.chunk / seconds
                tokens = done.tokens / (ended - began)
                found.append(Round(done.documents, done.bytes, done.tokens, bare, tokens))
    return found


def table(rounds: Sequence[Round]) -> str:
    """The report, as Markdown; the last row has medians."""
    lines = ["| texts | MB | tokens | bare step, tokens/s | gma batch, tokens/s | ratio |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [
        f"| {each.documents:,} | {each.bytes / 1e6:.1f} | {each.tokens:,} | {each.bare:,.0f} "
        f"| {each.batch:,.0f} | {each.ratio:.3f} |"
        for each in rounds
    ]
    bare, batch, ratio = (
        median(getattr(each, name) for each in rounds) for name in ("bare", "batch", "ratio")
    )
    return "\n".join([*lines, f"| median | | | {bare:,.0f} | {batch:,.0f} | {ratio:.3f} |"])


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
