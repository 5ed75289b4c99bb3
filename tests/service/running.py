"""A running service as its clients see it: over sockets, and by its metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gma.service.app import local
from gma.service.settings import Settings
from tests.service.asgi import PATIENCE_S

PLAIN = {"content-type": "text/plain"}


def has_ipv6() -> bool:
    """Whether this machine has IPv6's loopback address."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Connection:
    """A chunked upload over a socket, and the lines of its answer as they come."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        port: int,
        accept: str,
        *,
        host: str = "127.0.0.1",
        key: str | None = None,
        path: str = "/v1/documents",
    ) -> AsyncIterator[Connection]:
        reader, writer = await asyncio.open_connection(host, port)
        head = (
            f"POST {path} HTTP/1.1",
            "host: service",
            "content-type: text/plain",
            f"accept: {accept}",
            "transfer-encoding: chunked",
            *([f"authorization: Bearer {key}"] if key else []),
        )
        writer.write("\r\n".join([*head, "", ""]).encode())
        try:
            yield cls(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def send(self, body: bytes, *, last: bool = False) -> None:
        if body:
            self._writer.write(f"{len(body):x}\r\n".encode() + body + b"\r\n")
        if last:
            self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()

    async def line_with(self, start: bytes, *, seconds: float = PATIENCE_S) -> bytes:
        async with asyncio.timeout(seconds):
            while not (line := await self._reader.readline()).startswith(start):
                assert line, "the connection was closed"
            return line

    async def json(self) -> Any:
        """A flat object."""
        async with asyncio.timeout(PATIENCE_S):
            return json.loads(await self._reader.readuntil(b"}"))

    async def event(self, *, seconds: float = PATIENCE_S) -> dict[str, Any]:
        line = await self.line_with(b'{"event"', seconds=seconds)
        event: dict[str, Any] = json.loads(line)
        return event


def resident_peak(pid: int) -> int:
    """Bytes, as the kernel counts them."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


class Running:
    """The service under test, from outside."""

    def __init__(self, settings: Settings) -> None:
        self.port = settings.port
        self.url = local.url(settings)

    def classify(self, text: str) -> dict[str, Any]:
        response = httpx.post(
            f"{self.url}/v1/documents", content=text, headers=PLAIN, timeout=PATIENCE_S
        )
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def metrics(self, name: str) -> dict[str, float]:
        """The values of a metric by its labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=PATIENCE_S).text.splitlines()
        found = [
            line.rpartition(" ") for line in lines if line.startswith((f"{name} ", f"{name}{{"))
        ]
        return {labels: float(value) for labels, _, value in found}

    def processes(self, role: str) -> list[int]:
        """The ids of the processes of a role."""
        name = "gma_resident_memory_bytes"
        return [
            int(labels.partition('pid="')[2].partition('"')[0])
            for labels in self.metrics(name)
            if f'role="{role}"' in labels
        ]

    def settle(self, **values: float) -> None:
        """Ask until the metrics have these values."""
        for _ in range(1000):
            now = {name: sum(self.metrics(name).values()) for name in values}
            if now == values:
                return
        pytest.fail(f"{now}, not {values}")
