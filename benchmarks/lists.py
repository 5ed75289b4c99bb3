"""Texts a second as other servers' clients send them, beside our own route, on this machine.

    python -m benchmarks.lists
    GMA_GATEWAYS=1 python -m benchmarks.lists     any setting, as for `gma serve`

All ways take turns in the same service, so that their ratios hold where their figures do not: so
many connections that send a text after the other to /v1/documents, as many to /predict, and lists
of texts to /predict, and to /v1/documents:batch, one after the other. Then the first two once more:
the most texts a second that some number of connections gets with the 99th percentile within the
SLO. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import httpx

from benchmarks.checkpoints import BOOKS
from benchmarks.processes import service
from benchmarks.timing import markdown

TEXT = "The sea was calm, and nobody spoke of the ships that had left in the night. " * 3
OURS, THEIRS, LIST = "/v1/documents, each", "/predict, each", "/predict, in a list"
BATCH = "/v1/documents:batch"
ONE_BY_ONE: Mapping[str, tuple[str, Mapping[str, object]]] = {
    OURS: ("/v1/documents", {"text": TEXT}),
    THEIRS: ("/predict", {"inputs": TEXT}),
}
SLO_S = 0.2
WHOLE = LIST, BATCH
"""Ways by which all texts go by one request."""


async def texts_a_second(client: httpx.AsyncClient, way: str, texts: int, at_once: int) -> float:
    """How fast so many texts are answered."""
    path, asked = {
        **ONE_BY_ONE,
        LIST: ("/predict", {"inputs": [TEXT] * texts}),
        BATCH: (BATCH, {"text": TEXT}),
    }[way]
    times = texts if way == BATCH else 1
    content = (json.dumps(asked).encode() + b"\n") * times
    headers = {"content-type": "application/x-ndjson" if way == BATCH else "application/json"}
    requests = iter(range(1 if way in WHOLE else texts))

    async def one_after_the_other(content: bytes) -> None:
        for _ in requests:
            answer = await client.post(path, content=content, headers=headers)
            answer.raise_for_status()
            if way == BATCH and answer.text.count('"scores"') != texts:
                raise RuntimeError(answer.text)

    began = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(at_once):
            tasks.create_task(one_after_the_other(content))
    return texts / (time.monotonic() - began)


async def turns(url: str, texts: int, at_once: int, rounds: int) -> dict[str, list[float]]:
    """Texts a second of each way, in each of the rounds."""
    ways = OURS, THEIRS, LIST, BATCH
    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        for way in ways:  # what is slow only once
            await texts_a_second(client, way, texts, at_once)
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                found[way].append(await texts_a_second(client, way, texts, at_once))
    return found


async def rate_within_slo(client: httpx.AsyncClient, way: str, most: int, seconds: float) -> float:
    """The most texts a second, answered with the 99th percentile within the SLO."""
    path, asked = ONE_BY_ONE[way]
    best = 0.0
    at_once = 1
    while at_once <= most:
        took: list[float] = []
        began = time.monotonic()

        async def one_after_the_other() -> None:
            while (sent := time.monotonic()) < began + seconds:  # noqa: B023 (called within)
                answer = await client.post(path, json=asked)
                answer.raise_for_status()
                took.append(time.monotonic() - sent)  # noqa: B023

        async with asyncio.TaskGroup() as tasks:
            for _ in range(at_once):
                tasks.create_task(one_after_the_other())
        rate = len(took) / (time.monotonic() - began)
        p99 = sorted(took)[int(0.99 * len(took))]
        if p99 <= SLO_S:
            best = max(best, rate)
        elif p99 > 2 * SLO_S:
            break
        at_once += max(1, at_once // 2)
    return best


async def rates(url: str, most: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Texts a second within the SLO of both ways that send them one by one, in each round."""
    limits = httpx.Limits(max_connections=most)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        found: dict[str, list[float]] = {way: [] for way in ONE_BY_ONE}
        for number in range(rounds):
            for way in (OURS, THEIRS) if number % 2 else (THEIRS, OURS):
                found[way].append(await rate_within_slo(client, way, most, seconds))
    return found


def table(found: dict[str, list[float]]) -> str:
    """The report, as Markdown. A ratio is the median of the rounds' own."""

    def line(way: str) -> list[str]:
        ratios = [own / ours for own, ours in zip(found[way], found[OURS], strict=True)]
        return [way, f"{median(found[way]):,.0f}", f"{median(ratios):.2f}"]

    header = ["way", "texts a second, median", f"of {OURS}, median of the rounds' ratios"]
    return markdown(header, map(line, found))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=BOOKS)
    parser.add_argument("--texts", type=int, default=64, help="of a turn")
    parser.add_argument("--at-once", type=int, default=64, help="connections")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--slo-rounds", type=int, default=3)
    parser.add_argument("--slo-seconds", type=float, default=5.0, help="for each number at once")
    parser.add_argument("--log", type=Path, help="file for the service's log")
    arguments = parser.parse_args(argv)
    with service(arguments.log, checkpoint=arguments.checkpoint) as running:
        found = asyncio.run(
            turns(running.url, arguments.texts, arguments.at_once, arguments.rounds)
        )
        print(table(found))
        within = asyncio.run(
            rates(running.url, arguments.at_once, arguments.slo_rounds, arguments.slo_seconds)
        )
    print(f"\nThe most with a 99th percentile within {SLO_S} s:\n")
    print(table(within))


if __name__ == "__main__":
    main()
