"""Ray Serve's calls and its proxy beside what the service has in their place.

    python -m benchmarks.transport
    RAY_SERVE_ENABLE_HA_PROXY=1 python -m benchmarks.transport     HAProxy as Serve's proxy

There is no model, and whoever is asked answers at once. Between the same two replicas: a call of
Serve's handle and a streaming one, a unary gRPC call, and a gRPC stream that is opened, takes a
message each way and is closed. Over HTTP to the same replica: on a port where it listens itself
with uvicorn, and through Serve's proxy. All take turns, with one call in flight and then with
several. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import aiohttp
import ray
from ray import serve

from benchmarks import echo
from benchmarks.processes import free_port
from benchmarks.timing import markdown
from gma.loadtest.report import Latency

LISTENING, PROXY = "HTTP, uvicorn", "HTTP, Serve's proxy"
AGAINST = {
    echo.GRPC_CALL: echo.GRPC_CALL,
    echo.HANDLE_CALL: echo.GRPC_CALL,
    echo.GRPC_STREAM: echo.GRPC_STREAM,
    echo.HANDLE_STREAM: echo.GRPC_STREAM,
    LISTENING: LISTENING,
    PROXY: LISTENING,
}
"""Every way, and the one that it is compared with."""

QUANTILES = "p50", "p99"
WARM_S = 1.0

PROCESSES = 4
"""Three replicas and Serve's controller."""

ENVIRONMENT = {
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}
"""What the processes that Ray starts are to find, unless it is set to something else."""

Timed = Callable[[int, float], list[float]]
"""Seconds of each call, with so many in flight for so many seconds."""


@dataclass(frozen=True)
class Row:
    """What all turns of one way came to."""

    way: str
    at_once: int
    latency: Latency
    per_second: float


@contextmanager
def serving() -> Iterator[dict[str, Timed]]:
    """Start a Ray and a Serve, set up as the service's, and give every way of `AGAINST`."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ray.init(
        address="local", num_cpus=PROCESSES, include_dashboard=False, logging_level=logging.ERROR
    )
    try:
        ports = {PROXY: free_port(), LISTENING: free_port()}
        serve.start(http_options={"host": echo.HOST, "port": ports[PROXY]})
        caller = serve.run(echo.callers(), name="callers", route_prefix=None)
        serve.run(echo.web(ports[LISTENING]), name="web", route_prefix="/")

        def between(way: str, at_once: int, seconds: float) -> list[float]:
            taken: list[float] = caller.time.remote(way, at_once, seconds).result()
            return taken

        urls = {way: f"http://{echo.HOST}:{port}/" for way, port in ports.items()}
        yield {
            way: partial(over_http, urls[way]) if way in urls else partial(between, way)
            for way in AGAINST
        }
    finally:
        ray.shutdown()


def over_http(url: str, at_once: int, seconds: float) -> list[float]:
    """Seconds of each request of one client that keeps its connections."""

    async def run() -> list[float]:
        async with aiohttp.ClientSession(raise_for_status=True) as session:

            async def call() -> None:
                async with session.post(url, data=echo.MESSAGE) as response:
                    echo.check(await response.read())

            return await echo.timed(call, at_once, seconds)

    return asyncio.run(run())


def turns(ways: Mapping[str, Timed], at_once: int, seconds: float, rounds: int) -> list[Row]:
    """Let the ways take turns. Raises what a call raises."""
    for call in ways.values():
        call(at_once, min(seconds, WARM_S))
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, call in ways.items():
            taken[way] += call(at_once, seconds)
    rows: list[Row] = []
    for way, found in taken.items():
        latency = Latency.of(found)
        assert latency  # the first call begins at once
        rows.append(Row(way, at_once, latency, len(found) / (seconds * rounds)))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The report, as Markdown."""
    found = {(row.way, row.at_once): row.latency.quantiles for row in rows}

    def line(row: Row) -> list[str]:
        own, base = row.latency.quantiles, found[AGAINST[row.way], row.at_once]
        times = [f"{own[name] * 1e3:.2f}" for name in QUANTILES]
        ratios = [f"{own[name] / base[name]:.1f}" for name in QUANTILES]
        against = [*ratios, AGAINST[row.way]] if AGAINST[row.way] != row.way else [""] * 3
        return [str(row.at_once), row.way, *times, f"{row.per_second:,.0f}", *against]

    header = ["in flight", "way", "p50, ms", "p99, ms", "a second", "p50 ratio", "p99 ratio", "to"]
    return markdown(header, map(line, rows))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 32], help="in flight")
    arguments = parser.parse_args(argv)
    with serving() as ways:
        rows = [
            row
            for at_once in arguments.at_once
            for row in turns(ways, at_once, arguments.seconds, arguments.rounds)
        ]
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, Ray {ray.__version__}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
