"""Runs: what is to be done, in which order, and the folder that their results are in.

Several processes may share a folder: each claims a run by a lock that ends with it. What is
written there is only ever a finished run.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.comparison.gaussian import MIXERS
from benchmarks.comparison.suite import RECIPES

SPEED = "speed"
TASKS = ("language", "recall", "states", SPEED, "needle", "listops", "books", "imdb", "grain")
"""The most telling first. Speed is a run too, but it trains nothing."""

RATES = 2e-3, 4e-3, 1e-3
"""Learning rates that all mixers try, the likeliest first."""

Result = dict[str, Any]


class Run(NamedTuple):
    """One model, from its first step to its figures."""

    task: str
    mixer: str
    rate: float
    seed: int
    pretrained: bool

    @property
    def name(self) -> str:
        mixer = "-".join(self.mixer.replace("(", "").replace(")", "").replace(",", "").split())
        scratch = "" if self.pretrained else "-scratch"
        return f"{self.task}-{mixer}-{self.rate:g}-{self.seed}{scratch}"


class Wanted(NamedTuple):
    """What the command asks for."""

    tasks: Sequence[str]
    mixers: Sequence[str]
    rates: Sequence[float]
    seeds: Sequence[int]
    pretrained: bool

    def runs(self, folder: Folder) -> Iterator[Run]:
        """Yield what can be run now: all tasks and mixers at one rate after the other, and then, at
        the rate that was best on valid with the first seed, the other seeds."""
        for number in range(len(self.rates)):
            for task, mixer in self.rows():
                yield from self.first(task, mixer)[number : number + 1]
        for seed in self.seeds[1:]:
            for task, mixer in self.rows():
                tried = [folder.read(run) for run in self.first(task, mixer)]
                done = [result for result in tried if result is not None]
                if task != SPEED and len(done) == len(tried):
                    yield self.run(task, mixer, best(done)["rate"], seed)

    def first(self, task: str, mixer: str) -> list[Run]:
        """Return the runs of the first seed: at all rates, or one that has none."""
        rates = [0.0] if task == SPEED else self.rates
        return [self.run(task, mixer, rate, self.seeds[0]) for rate in rates]

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield tasks with the mixers that they can be asked of."""
        for task in self.tasks:
            for mixer in self.mixers:
                if MIXERS[mixer].causal or task == SPEED or RECIPES[task].size.labels:
                    yield task, mixer

    def run(self, task: str, mixer: str, rate: float, seed: int) -> Run:
        pretraining = task != SPEED and RECIPES[task].pretraining > 0
        return Run(task, mixer, rate, seed, self.pretrained or not pretraining)


class Folder:
    """Results, each a JSON file that is named as its run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def read(self, run: Run) -> Result | None:
        """Return what is known of a run; None if it has not ended."""
        file = self._file(run)
        return json.loads(file.read_text()) if file.exists() else None

    def results(self) -> list[Result]:
        """Return all finished runs."""
        return [json.loads(file.read_text()) for file in sorted(self.path.glob("*.json"))]

    def failures(self) -> dict[str, str]:
        """Return why runs failed that have not ended otherwise since, by their name."""
        files = sorted(self.path.glob("*.failed"))
        return {file.stem: file.read_text() for file in files if not _done(file).exists()}

    def write(self, run: Run, result: Result) -> None:
        """Record a finished run; nobody sees a part of a file."""
        file = self._file(run)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({**run._asdict(), **result}, indent=1) + "\n")
        part.replace(file)
        file.with_suffix(".failed").unlink(missing_ok=True)

    def fail(self, run: Run, why: str) -> None:
        """Note that a run ended without a result, and why."""
        self._file(run).with_suffix(".failed").write_text(why)

    @contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Say whether the run is ours: it has not ended, and no other process is at it."""
        with self._file(run).with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield not self._file(run).exists()

    def _file(self, run: Run) -> Path:
        return self.path / f"{run.name}.json"


def _done(file: Path) -> Path:
    return file.with_suffix(".json")


def best(results: Sequence[Result]) -> Result:
    """Return the one that does best on valid; what is not finite comes last."""

    def rank(result: Result) -> float:
        score = result["score"] * (1 if result["lower"] else -1)
        return math.inf if math.isnan(score) else score

    return min(results, key=rank)
