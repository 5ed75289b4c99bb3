"""A service under a steady load for minutes: what is lost, what slows down, and what grows.

    python -m benchmarks.soak --data BOOKS

Texts of a log-normal length (median 2 KB, sigma 1) cut from the split of --data, Poisson arrivals
at a rate that the service sustains, default checkpoint and settings. Each row is a tenth of the
time. Memory is what /proc says. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.processes import resident_bytes, service
from gma.loadtest.report import Latency
from gma.loadtest.trial import Load, Trial, run

PARTS = 10
PERIOD_S = 5.0
ROLES = ("Gateway", "Worker", "ServeController", "raylet", "gcs_server")


@dataclass
class Watch:
    """Samples of memory by role."""

    began: float = field(default_factory=time.time)
    samples: list[tuple[float, dict[str, int]]] = field(default_factory=list)  # since 1970

    def within(self, first: float, last: float) -> dict[str, float]:
        """Each role's median between two moments."""
        found = [memory for at, memory in self.samples if first <= at < last]
        roles = set().union(*found)
        return {role: median(memory.get(role, 0) for memory in found) for role in roles}


@contextmanager
def watching(root: int) -> Iterator[Watch]:
    """Watch a process and all below it for as long as the context lasts."""
    watch, over = Watch(), threading.Event()

    def look() -> None:
        while not over.wait(PERIOD_S):
            watch.samples.append((time.time(), resident_bytes(root, peak=False)))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def table(trial: Trial, watch: Watch) -> str:
    """The report, as Markdown."""
    begin, length = trial.load.warm_s, trial.load.seconds / PARTS
    memories = [
        watch.within(trial.began + begin + i * length, trial.began + begin + (i + 1) * length)
        for i in range(PARTS)
    ]
    roles = [role for role in ROLES if any(role in memory for memory in memories)]
    columns = ["from, s", "documents", "failed", "p50", "p99", *(f"{role}, MB" for role in roles)]
    lines = [columns, ["---"] * len(columns)]
    for i, memory in enumerate(memories):
        first = begin + i * length
        due = [each for each in trial.outcomes if first <= each.due < first + length]
        failed = [each for each in due if each.error]
        latency = Latency.of([each.seconds for each in due if not each.error])
        quantiles = latency.quantiles if latency else {"p50": 0.0, "p99": 0.0}
        waits = [f"{quantiles['p50']:.2f} s", f"{quantiles['p99']:.2f} s"]
        sizes = [f"{memory.get(role, 0) / 1e6:.0f}" for role in roles]
        lines.append([f"{i * length:.0f}", str(len(due)), str(len(failed)), *waits, *sizes])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of test*.jsonl.zst")
    parser.add_argument("--rate", type=float, default=8.0, help="documents a second")
    parser.add_argument("--minutes", type=float, default=10.0)
    arguments = parser.parse_args(argv)
    with (
        service(log_level="WARNING") as running,
        watching(running.pid) as watch,
    ):
        load = Load(
            running.url,
            corpus=next(arguments.data.glob("test*.jsonl*")),
            lengths="lognormal:2000,1",
            rate=arguments.rate,
            seconds=60 * arguments.minutes,
            warm_s=20.0,
        )
        trial = run(load)
    print(f"{os.cpu_count()} cores, {arguments.rate:g} documents a second\n")
    print(table(trial, watch))
    told = trial.after.sums.get("gma_documents_total", 0.0) if trial.after else 0.0
    answered = sum(not each.error for each in trial.outcomes)
    print(f"{len(trial.outcomes)} sent, {answered} answered; workers tell of {told:.0f} closed.")


if __name__ == "__main__":
    main()
