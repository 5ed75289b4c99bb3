"""What the service adds to the model: a short document over HTTP, beside a bare endpoint.

    python -m benchmarks.overhead

The bare endpoint is Starlette on uvicorn in a process of its own: it reads the body and answers at
once in the service's form. The service has a tiny model. They take turns, one document in flight
and then several. Prints Markdown.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from benchmarks.processes import free_port, service
from benchmarks.random_models import tiny_checkpoint
from gma.loadtest.report import Latency
from gma.loadtest.trial import Load, Trial, run

DOCUMENT = "fixed:500"
START_S = 60.0


@dataclass(frozen=True)
class Row:
    """What all turns of one server came to."""

    server: str
    at_once: int
    latency: Latency
    per_second: float
    inside_s: float  # the median that answers themselves tell


def endpoint(port: int) -> None:
    """Serve the bare endpoint until the process is terminated."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def answer(request: Request) -> JSONResponse:
        usage = {"bytes": len(await request.body()), "tokens": 1, "chunks": 1}
        return JSONResponse({"label": "x", "usage": usage})

    app = Starlette(routes=[Route("/v1/documents", answer, methods=["POST"])])
    uvicorn.run(app, port=port, log_level="warning")


@contextmanager
def bare() -> Iterator[str]:
    """The bare endpoint in a process of its own, by its URL."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(target=endpoint, args=(port,))
    process.start()
    try:
        url = f"http://127.0.0.1:{port}"
        _await(url)
        yield url
    finally:
        process.terminate()
        process.join()


def _await(url: str) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        try:
            httpx.get(url)
        except httpx.ConnectError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit("the bare endpoint did not start")


def measure(checkpoint: Path, seconds: float, rounds: int, at_once: Sequence[int]) -> list[Row]:
    """Compare both servers, once for each number of documents in flight."""
    with bare() as bare_url, service(checkpoint=checkpoint, log_level="WARNING") as running:
        urls = {"bare": bare_url, "service": running.url}
        return [row for number in at_once for row in turns(urls, number, seconds, rounds)]


def turns(urls: dict[str, str], at_once: int, seconds: float, rounds: int) -> list[Row]:
    """Let the servers take turns. Raises SystemExit if a document is not answered."""
    load = Load("", lengths=DOCUMENT, at_once=at_once, seconds=seconds, warm_s=1.0)
    trials: dict[str, list[Trial]] = {name: [] for name in urls}
    for _ in range(rounds):
        for name, url in urls.items():
            trials[name].append(run(replace(load, url=url)))
    rows: list[Row] = []
    for name, found in trials.items():
        outcomes = [o for trial in found for o in trial.outcomes if o.due >= load.warm_s]
        latency = Latency.of([outcome.seconds for outcome in outcomes])
        if latency is None or any(outcome.error for outcome in outcomes):
            raise SystemExit(f"{name}: {next((o.error for o in outcomes if o.error), 'no answer')}")
        told = Latency.of([outcome.timing_ms.get("total", 0.0) / 1e3 for outcome in outcomes])
        inside = told.quantiles["p50"] if told else 0.0
        per_second = latency.documents / (seconds * rounds)
        rows.append(Row(name, at_once, latency, per_second, inside))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The report, as Markdown."""
    lines = [
        "| in flight | server | p50 | p99 | inside, p50 | documents/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        quantiles = row.latency.quantiles
        inside = f"{row.inside_s * 1e3:.1f} ms" if row.server == "service" else ""
        lines.append(
            f"| {row.at_once} | {row.server} | {quantiles['p50'] * 1e3:.1f} ms "
            f"| {quantiles['p99'] * 1e3:.1f} ms | {inside} | {row.per_second:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8], help="in flight")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="gma-") as folder:
        checkpoint = Path(folder)
        tiny_checkpoint(checkpoint)
        rows = measure(checkpoint, arguments.seconds, arguments.rounds, arguments.at_once)
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
