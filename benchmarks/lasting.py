"""A long document whose worker is killed half-way, beside the same one left alone.

    python -m benchmarks.lasting --text BOOK --bytes 3000000

One service with two workers of a core each; the document, a text over and over, is sent whole, in
turns with and without a kill. A worker that was killed is waited for before the next turn. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import httpx

from benchmarks import timing
from benchmarks.checkpoints import BOOKS
from benchmarks.processes import Service, service
from gma import Answer, Client
from gma.loadtest import server

WORKERS = 2
PATIENCE_S = 600.0
LOOK_S = 0.05
SAME = 1e-5
"""How far scores may be apart: rows fall into other steps after a loss."""


class Turn(NamedTuple):
    """One document."""

    seconds: float
    answer: Answer
    moved: float
    """Documents that went on elsewhere, of this turn."""
    rises: Sequence[tuple[float, int]]
    """When more was told to be read than ever before, and how many tokens that were."""

    @property
    def pause(self) -> int:
        """Before which of the rises nothing more was read for longest."""
        gaps = [b[0] - a[0] for a, b in pairwise(self.rises)]
        return gaps.index(max(gaps)) + 1

    @property
    def pause_s(self) -> float:
        return self.rises[self.pause][0] - self.rises[self.pause - 1][0]

    def speeds(self) -> tuple[float, float]:
        """Tokens a second before the pause and after it."""
        before, after = self.rises[: self.pause], self.rises[self.pause :]
        first, second = (
            (each[-1][1] - each[0][1]) / max(each[-1][0] - each[0][0], LOOK_S)
            for each in (before, after)
        )
        return first, second


def counters(running: Service) -> Mapping[str, float]:
    told = server.scrape(running.url)
    assert told
    return told.sums


def workers(running: Service) -> set[int]:
    """The processes that tell of themselves as workers."""
    told = httpx.get(f"{running.url}/metrics", timeout=PATIENCE_S, trust_env=False).text
    lines = [x for x in told.splitlines() if x.startswith("gma_resident_memory_bytes{")]
    pids = [int(x.partition('pid="')[2].partition('"')[0]) for x in lines if 'role="worker"' in x]
    return set(pids)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def turn(running: Service, text: bytes, *, kill_after_s: float | None = None) -> Turn:
    """Send the text; kill the worker that reads it so long after, if at all."""
    with ThreadPoolExecutor(1) as sending:
        there = {pid: cpu_s(pid) for pid in workers(running)}
        before, began = counters(running).get("gma_documents_moved_total", 0.0), time.monotonic()
        reading = sending.submit(read, running, text)
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(max(there, key=lambda pid: cpu_s(pid) - there[pid]), signal.SIGKILL)
        answer, rises = reading.result()
        seconds = time.monotonic() - began
    moved = counters(running)["gma_documents_moved_total"] - before
    if kill_after_s is not None:
        while len(workers(running) - set(there)) < 1 or len(workers(running)) < WORKERS:
            time.sleep(LOOK_S)
    return Turn(seconds, answer, moved, rises)


def read(running: Service, text: bytes) -> tuple[Answer, list[tuple[float, int]]]:
    """The answer, and when more had been read than ever before."""
    rises = [(time.monotonic(), 0)]
    with Client(running.url, timeout=PATIENCE_S, retries=0) as client:
        for event in client.stream(text):
            if isinstance(event, Answer):
                return event, rises
            if event.tokens > rises[-1][1]:
                rises.append((time.monotonic(), event.tokens))
    raise AssertionError("there is an answer at the end, or an error")


def same(one: Answer, other: Answer) -> bool:
    scores, others = ({x.label: x.score for x in each.scores} for each in (one, other))
    return (
        (one.bytes, one.tokens) == (other.bytes, other.tokens)
        and scores.keys() == others.keys()
        and all(abs(scores[label] - others[label]) < SAME for label in scores)
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bytes", type=int, default=3_000_000)
    parser.add_argument("--checkpoint", type=Path, default=BOOKS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/lasting"))
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = arguments.text.read_bytes()
    text = (text * (arguments.bytes // len(text) + 1))[: arguments.bytes]
    text = text.decode(errors="ignore").encode()
    settings = {"workers": WORKERS, "threads": 1, "checkpoint": arguments.checkpoint.absolute()}
    with service(arguments.out / "service.log", **settings) as running:
        turn(running, text[:100_000])
        left, killed = [], []
        for _ in range(arguments.rounds):
            left.append(turn(running, text))
            killed.append(turn(running, text, kill_after_s=left[-1].seconds / 2))
    answer = left[0].answer
    lines = [
        ("figure", "value", "at most"),
        ("---", "---", "---"),
        ("document", f"{len(text):,} bytes, {answer.tokens:,} tokens", ""),
        ("left alone, s", ", ".join(f"{each.seconds:.1f}" for each in left), ""),
        ("its worker killed half-way, s", ", ".join(f"{x.seconds:.1f}" for x in killed), ""),
        (
            "ratio of each pair",
            ", ".join(f"{b.seconds / a.seconds:.3f}" for a, b in zip(left, killed, strict=True)),
            "1.1",
        ),
        (
            "nothing more was read for at most, s: left alone; killed",
            "; ".join(", ".join(f"{x.pause_s:.1f}" for x in turns) for turns in (left, killed)),
            "",
        ),
        (
            "tokens a second before and after the loss",
            ", ".join("{:,.0f} and {:,.0f}".format(*x.speeds()) for x in killed),
            "",
        ),
        ("went on elsewhere", f"{sum(x.moved for x in killed):.0f} of {len(killed)}", ""),
        ("other answers", str(sum(not same(answer, x.answer) for x in [*left, *killed])), "0"),
    ]
    found = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    ratio = median(b.seconds / a.seconds for a, b in zip(left, killed, strict=True))
    timing.save(arguments.out, "lasting", {"ratio": ratio}, found)
    print(found)


if __name__ == "__main__":
    main()
