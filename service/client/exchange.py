"""One request and its answer, which may come while the request is still being sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import aiohttp

from gma.service.client.error import ConnectionLost, ServiceError
from gma.service.client.upload import Upload

T = TypeVar("T")

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
NDJSON = "application/x-ndjson"


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    method: str
    path: str
    upload: Upload | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


class Exchange:
    """One attempt at a request.

    It ends when nothing has happened for some time: no piece of the document taken, none of the
    answer come. While the document itself is waited for, nothing needs to.
    """

    def __init__(self, http: aiohttp.ClientSession, url: str, timeout_s: float) -> None:
        """`url`: of the service."""
        self._http = http
        self._url = url
        self._timeout_s = timeout_s
        self._limit: asyncio.Timeout | None = None
        self._waits = False
        self._upload: Upload | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._read: bytes | None = None

    @property
    def request_id(self) -> str | None:
        """The answer's, as the service's log has it."""
        assert self._response
        return self._response.headers.get("x-request-id")

    async def begin(self, request: Request, deadline_s: float | None = None) -> None:
        """Send it until the answer begins; a document may still be on its way then.

        `deadline_s`: what the service may take until it has read the document.

        Raises ServiceError for any status but those of success, ConnectionLost, TimeoutError, and
        what the document's source raises.
        """
        headers = dict(request.headers)
        if deadline_s is not None:
            headers["x-deadline-ms"] = str(max(1, round(deadline_s * 1000)))
        pieces = None
        self._upload = request.upload
        if request.upload:
            if request.upload.size is not None:
                headers["Content-Length"] = str(request.upload.size)
            pieces = request.upload.pieces(self._wait, self._go_on)
        asked = self._http.request(
            request.method,
            self._url + request.path,
            params=request.query,
            headers=headers,
            data=pieces,
            allow_redirects=False,
        )
        self._response = await self._until(asked)
        if not 200 <= self._response.status < 300:
            if self._upload:
                self._upload.stop()
            self._go_on()
            told = {name.lower(): value for name, value in self._response.headers.items()}
            raise ServiceError.answered(self._response.status, told, await self.read())

    async def read(self) -> bytes:
        """Return all of the answer. Raises what `begin` does."""
        if self._read is None:
            self._read = b"".join([piece async for piece in self._pieces()])
        return self._read

    async def lines(self) -> AsyncIterator[bytes]:
        """The answer's lines as they come, of any length. Raises what `begin` does."""
        begun: list[bytes] = []  # of a line that is not whole yet
        async for piece in self._pieces():
            *whole, rest = piece.split(b"\n")
            for line in whole:
                yield b"".join([*begun, line])
                begun = []
            begun.append(rest)
        if last := b"".join(begun):
            yield last

    def close(self) -> None:
        """End it: what is not read of the answer, or not sent yet, never will be."""
        if self._upload:
            self._upload.stop()
        if self._response:
            self._response.close()

    async def _pieces(self) -> AsyncIterator[bytes]:
        assert self._response
        while piece := await self._until(self._response.content.readany()):
            yield piece

    async def _until(self, something: Awaitable[T]) -> T:
        """What comes of something, unless nothing happens for too long."""
        try:
            async with asyncio.timeout(None if self._waits else self._timeout_s) as self._limit:
                return await something
        except (aiohttp.ClientError, TimeoutError) as error:
            if self._upload and self._upload.error:
                raise self._upload.error from None
            if self._limit and self._limit.expired():
                message = f"{self._url}: nothing has happened for {self._timeout_s:g} s"
                raise TimeoutError(message) from None
            raise ConnectionLost(f"{self._url}: {error or type(error).__name__}") from error
        finally:
            self._limit = None

    def _wait(self) -> None:
        self._waits = True
        self._reschedule()

    def _go_on(self) -> None:
        self._waits = False
        self._reschedule()

    def _reschedule(self) -> None:
        if self._limit:
            now = asyncio.get_running_loop().time()
            self._limit.reschedule(None if self._waits else now + self._timeout_s)
