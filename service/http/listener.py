"""The HTTP server of a gateway on one machine, where all gateways listen on the same port."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from socket import socket
from typing import Self, cast

import uvicorn
from starlette.types import ASGIApp

from gma.service.http.connection import Connection, Limits
from gma.service.http.port import bound
from gma.service.http.room import Room, most_connections

WAITING = 2048
"""How many connections the kernel keeps until they are taken."""

TAKEN_AT_ONCE = 64
"""How many of them are taken before the room for them is looked at."""


class Listener:
    """Serves an application over HTTP until it is closed."""

    def __init__(self, server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
        self._server = server
        self._serving = serving

    @classmethod
    async def open(
        cls,
        application: ASGIApp,
        host: str,
        port: int,
        *,
        limits: Limits | None = None,
        connections: int | None = None,
    ) -> Self:
        """Listen. Other processes of this user can on the same port, and the kernel gives each
        connection to one of them.

        `connections`: how many there may be at once, by default what the limit of open files
        allows. Raises OSError, or RuntimeError if the application does not start.
        """
        limits = limits or Limits()
        room = Room(connections or most_connections())
        config = uvicorn.Config(
            application,
            # Called with what uvicorn gives each connection.
            http=cast("type[asyncio.Protocol]", partial(Connection, limits=limits, room=room)),
            ws="none",  # so that `Upgrade: websocket` is passed over as any other
            lifespan="on",
            log_config=None,
            log_level="error",  # what clients send is no warning
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=limits.keep_alive_s,
            backlog=TAKEN_AT_ONCE,
        )
        server = _Server(config)
        listening = bound(host, port, shared=True)
        serving = asyncio.create_task(server.serve(sockets=[listening]), name="listener")
        begun = asyncio.create_task(server.begun.wait())
        await asyncio.wait((begun, serving), return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        if serving.done():
            await serving  # which raises
        listening.listen(WAITING)
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
