"""The HTTP server of a gateway on one machine, where all gateways listen on the same port."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from socket import socket
from typing import Self

import uvicorn
from starlette.types import ASGIApp

from gma.service.http.port import bound

KEEP_ALIVE_S = 75
"""How long a connection may have nothing to do; longer than the pools of clients keep one."""


class Listener:
    """Serves an application over HTTP until it is closed."""

    def __init__(self, server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
        self._server = server
        self._serving = serving

    @classmethod
    async def open(cls, application: ASGIApp, host: str, port: int) -> Self:
        """Listen. Other processes of this user can on the same port, and the kernel gives each
        connection to one of them. Raises OSError, or RuntimeError if the application does not
        start."""
        config = uvicorn.Config(
            application,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        server = _Server(config)
        listening = bound(host, port, shared=True)
        listening.listen(config.backlog)
        serving = asyncio.create_task(server.serve(sockets=[listening]), name="listener")
        begun = asyncio.create_task(server.begun.wait())
        await asyncio.wait((begun, serving), return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        if serving.done():
            await serving  # which raises
        return cls(server, serving)

    async def close(self) -> None:
        """Take no new connections, and return when those there are have had their answers."""
        self._server.should_exit = True
        await self._serving


class _Server(uvicorn.Server):
    """Tells when it listens, and leaves signals to whose process this is."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.begun = asyncio.Event()

    async def startup(self, sockets: list[socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit:  # which would end the process without a word
            raise RuntimeError("the HTTP server did not start") from None
        self.begun.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
