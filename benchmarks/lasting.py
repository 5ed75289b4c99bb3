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
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import httpx

from benchmarks import timing
from benchmarks.checkpoints import BOOKS
from benchmarks.processes import Service, service
from gma.loadtest import server

WORKERS = 2
PATIENCE_S = 600.0
LOOK_S = 0.05
SAME = 1e-5
"""How far scores may be apart: rows fall into other steps after a loss."""


class Turn(NamedTuple):
    """One document."""

    seconds: float
    answer: Mapping[str, Any]
    moved: float
    """Documents that went on elsewhere, of this turn."""


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
        answer: Future[httpx.Response] = sending.submit(
            httpx.post,
            f"{running.url}/v1/documents",
            content=text,
            headers={"Content-Type": "text/plain"},
            timeout=PATIENCE_S,
            trust_env=False,
        )
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(max(there, key=lambda pid: cpu_s(pid) - there[pid]), signal.SIGKILL)
        response = answer.result()
        seconds = time.monotonic() - began
    if response.status_code != 200:
        raise SystemExit(f"{response.status_code}: {response.text}")
    moved = counters(running)["gma_documents_moved_total"] - before
    if kill_after_s is not None:
        while len(workers(running) - set(there)) < 1 or len(workers(running)) < WORKERS:
            time.sleep(LOOK_S)
    return Turn(seconds, response.json(), moved)


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    scores, others = ({x["label"]: x["score"] for x in each["scores"]} for each in (one, other))
    return (
        one["usage"] == other["usage"]
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
        ("document", f"{len(text):,} bytes, {answer['usage']['tokens']:,} tokens", ""),
        ("left alone, s", ", ".join(f"{each.seconds:.1f}" for each in left), ""),
        ("its worker killed half-way, s", ", ".join(f"{x.seconds:.1f}" for x in killed), ""),
        (
            "ratio of each pair",
            ", ".join(f"{b.seconds / a.seconds:.3f}" for a, b in zip(left, killed, strict=True)),
            "1.1",
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
