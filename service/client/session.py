"""A document that stays open: `AsyncClient.session`."""

from __future__ import annotations

import json
from types import TracebackType
from typing import Any, Protocol, Self, Unpack
from urllib.parse import quote

from gma.service.client.attempts import Attempts
from gma.service.client.error import ConnectionLost, ServiceError
from gma.service.client.exchange import TEXT, Request
from gma.service.client.options import Options, query
from gma.service.client.upload import Upload
from gma.service.gateway.contract import Finding
from gma.service.python.answer import Answer

SESSIONS = "/v1/sessions"

MAYBE_TAKEN = {500, 502, 503, 504}
"""Statuses after which nobody knows whether what was appended is there."""

GONE = {404, 410}


class Service(Protocol):
    """What a session needs of its client."""

    def attempts(self) -> Attempts:
        """Those at one thing."""

    async def ask(self, request: Request, attempts: Attempts | None = None) -> bytes:
        """The answer to a request."""


class AsyncSession:
    """A document on the service that grows, with its answer so far at any time.

    ``async with await client.session() as session`` deletes it at the end. For one writer.
    """

    def __init__(self, service: Service, name: str, offset: int) -> None:
        self.id = name
        """By which `AsyncClient.session` finds it, from anywhere."""
        self.offset = offset
        """How many bytes were appended and acknowledged."""
        self._service = service
        self._path = f"{SESSIONS}/{quote(name, safe='')}"

    @classmethod
    async def begin(
        cls, service: Service, snapshot: bytes | None = None, *, model: str | None = None
    ) -> Self:
        """A new one, empty or where another was when its `snapshot` was made."""
        headers = {} if snapshot is None else {"Content-Type": "application/octet-stream"}
        upload = None if snapshot is None else Upload(snapshot)
        request = Request("POST", SESSIONS, upload, query(model=model), headers)
        told = await service.ask(request)
        return cls._told(service, told)

    @classmethod
    async def at(cls, service: Service, name: str) -> Self:
        """One that is there. Raises ServiceError if it is not."""
        session = cls(service, name, 0)
        session.offset = (await session._so_far({"top_k": 1}))["offset"]
        return session

    async def append(self, text: str | bytes, /, **options: Unpack[Options]) -> Answer:
        """Add text to the document, cut anywhere, and return what it looks like so far.

        What is lost on the way is sent again, from where the service has it: nothing is lost or
        repeated. Raises ServiceError, of status 409 if somebody else has appended, and
        ConnectionError; then `AsyncClient.session` with this `id` tells how much is there.
        """
        data = memoryview(text.encode() if isinstance(text, str) else text)
        begin, end = self.offset, self.offset + len(data)
        attempts = self._service.attempts()
        unsure = False  # whether something was taken that nobody told of
        while True:
            try:
                told = await self._append(data[self.offset - begin :], options)
            except ConnectionLost as error:
                unsure = True
                await attempts.again(error)
            except ServiceError as error:
                unsure = unsure or error.status in MAYBE_TAKEN
                if unsure and error.status == 409 and self._taken(error.offset, end):
                    continue
                busy = unsure and error.status == 409 and error.offset in (None, self.offset)
                await attempts.again(error, also=busy or error.status in MAYBE_TAKEN)
            else:
                self.offset = told["offset"]
                if self.offset == end:
                    return Answer.of(told)

    async def answer(self, **options: Unpack[Options]) -> Answer:
        """What the document looks like so far: without labels and scores if it is empty."""
        return Answer.of(await self.finding(**options))

    async def finding(self, **options: Unpack[Options]) -> Finding:
        """The same as the service says it in JSON."""
        finding: Finding = await self._so_far(options)
        return finding

    async def fork(self) -> Self:
        """Another session with the same past, and its own future."""
        told = await self._service.ask(Request("POST", f"{self._path}/fork"))
        return self._told(self._service, told)

    async def snapshot(self) -> bytes:
        """Its state, for `AsyncClient.resume`: some hundred KB, however long the document."""
        return await self._service.ask(Request("GET", f"{self._path}/snapshot"))

    async def delete(self) -> None:
        """End it: nothing is kept of it. One that is gone already is no error: so is one that was
        deleted when the answer was lost."""
        try:
            await self._service.ask(Request("DELETE", self._path))
        except ServiceError as error:
            if error.status not in GONE:
                raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self.delete()
        except (ServiceError, OSError):
            if error is None:  # else that is what went wrong
                raise

    @classmethod
    def _told(cls, service: Service, told: bytes) -> Self:
        made = json.loads(told)
        return cls(service, made["id"], made["offset"])

    async def _append(self, data: memoryview, options: Options) -> Any:
        headers = {"Content-Type": TEXT, "Upload-Offset": str(self.offset)}
        request = Request("PATCH", self._path, Upload(data), query(**options), headers)
        return json.loads(await self._service.ask(request, Attempts(0)))

    def _taken(self, offset: int | None, end: int) -> bool:
        """Whether an attempt without an answer has brought the document to this offset."""
        if offset is None or not self.offset < offset <= end:
            return False
        self.offset = offset
        return True

    async def _so_far(self, options: Options) -> Any:
        return json.loads(
            await self._service.ask(Request("GET", self._path, query=query(**options)))
        )
