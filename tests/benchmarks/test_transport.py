"""The comparison of transports: its calls against an echo in this process, and its table."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest

from benchmarks import echo, transport
from gma.loadtest.report import Latency


def test_grpc_calls_are_answered() -> None:
    async def run() -> dict[str, list[float]]:
        server, address = await echo.grpc_server()
        async with grpc.aio.insecure_channel(address) as channel:
            calls = echo.grpc_calls(channel)
            taken = {way: await echo.timed(call, 2, 0.1) for way, call in calls.items()}
        await server.stop(None)
        return taken

    taken = asyncio.run(run())
    assert taken.keys() == {echo.GRPC_CALL, echo.GRPC_STREAM}
    assert all(0 < seconds < 5 for found in taken.values() for seconds in found)


def test_as_many_calls_are_in_flight_as_asked_for() -> None:
    flying, most = 0, 0

    async def call() -> None:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0.01)
        flying -= 1

    assert len(asyncio.run(echo.timed(call, 3, 0.05))) >= 3
    assert (flying, most) == (0, 3)


def test_another_answer_than_the_message_counts_for_nothing() -> None:
    echo.check(echo.MESSAGE)
    with pytest.raises(ValueError, match="answer"):
        echo.check(b"")


def test_ways_take_turns() -> None:
    asked: list[str] = []

    def way(name: str, seconds: float) -> transport.Timed:
        def take(at_once: int, length: float) -> list[float]:
            asked.append(name)
            return [seconds] * at_once

        return take

    ways = {transport.LISTENING: way("a", 0.001), transport.PROXY: way("b", 0.004)}
    rows = transport.turns(ways, at_once=5, seconds=0.5, rounds=2)
    assert asked == ["a", "b"] * 3  # once more to warm up
    assert [row.per_second for row in rows] == [10.0, 10.0]


def test_transport_table() -> None:
    rows = []
    for at_once in (1, 32):
        for i, way in enumerate(transport.AGAINST):
            latency = Latency.of([at_once * (i + 1) / 1e3] * 3)
            assert latency
            rows.append(transport.Row(way, at_once, latency, 2000.0))
    lines = transport.table(rows).splitlines()
    assert len(lines) == 2 + 2 * len(transport.AGAINST)
    assert lines[2] == "| 1 | gRPC, call | 1.00 | 1.00 | 2,000 |  |  |  |"
    assert lines[3] == "| 1 | Serve handle, call | 2.00 | 2.00 | 2,000 | 2.0 | 2.0 | gRPC, call |"
    assert lines[13].startswith("| 32 | HTTP, Serve's proxy | 192.00 | 192.00 |")
