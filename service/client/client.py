"""The service from asyncio: `from gma import AsyncClient`."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self, Unpack

import aiohttp

from gma.service.client.attempts import Attempts
from gma.service.client.batch import Items, Told, lines, told
from gma.service.client.error import ConnectionLost, ServiceError
from gma.service.client.exchange import JSON, NDJSON, TEXT, Exchange, Request
from gma.service.client.options import Options, query
from gma.service.client.session import AsyncSession
from gma.service.client.upload import Document, OnSent, Upload
from gma.service.gateway import contract
from gma.service.python.answer import Answer, Progress

TIMEOUT_S = 600.0
RETRIES = 4
CONNECT_S = 10.0

DOCUMENTS = "/v1/documents"
BATCH = "/v1/documents:batch"


class AsyncClient:
    """A service that classifies documents, as asyncio's tasks ask it.

    ``async with AsyncClient(url) as client`` closes its connections at the end. For the tasks of
    one event loop.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float = TIMEOUT_S,
        retries: int = RETRIES,
    ) -> None:
        """`url`: where the service is, as http://127.0.0.1:8000. `key`: its API key.

        timeout: how many seconds nothing may happen while the service is waited for: no byte of a
            document taken, none of an answer come.
        retries: how often more than once a document is sent, if the connection is lost or the
            service says that it may be sent again, and it can be. The time between grows, and is
            what the service asks for, unless that is more than a minute.

        Raises ValueError for what is no URL.
        """
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"a URL is like http://127.0.0.1:8000, not {url!r}")
        self.url = url.rstrip("/")
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._timeout_s = timeout
        self._retries = retries
        self._http: aiohttp.ClientSession | None = None

    async def classify(
        self,
        document: Document,
        /,
        *,
        deadline_s: float | None = None,
        progress: OnSent | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """Classify a document: a text, bytes of UTF-8, a path, an open file, or an iterator of
        bytes, asynchronous or not. What is not in memory is sent piece by piece, and never whole
        in it.

        deadline_s: what the service may take until it has read the document, from now on.
        progress: called with how many bytes were sent, and how many there are if that is known.

        Raises ServiceError for what the service answers instead, ConnectionError if it is not
        there, TimeoutError if it says nothing, and what the document's source raises.
        """
        return Answer.of(
            await self.finding(document, deadline_s=deadline_s, progress=progress, **options)
        )

    async def finding(
        self,
        document: Document,
        /,
        *,
        deadline_s: float | None = None,
        progress: OnSent | None = None,
        **options: Unpack[Options],
    ) -> contract.Answer:
        """The same as the service says it in JSON."""
        request = _classifying(document, progress, options)
        told = await self.ask(request, Attempts(self._retries, deadline_s))
        answer: contract.Answer = json.loads(told)
        return answer

    async def stream(
        self,
        document: Document,
        /,
        *,
        deadline_s: float | None = None,
        progress: OnSent | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Progress | Answer, None]:
        """Classify a document, and tell how far it was read while it is, also while it is sent.

        Gives any number of `Progress`, then the `Answer`. Arguments and errors are those of
        `classify`; what has begun to be answered is not tried again.
        """
        request = _classifying(document, progress, options, accept=NDJSON)
        exchange = await self._begun(request, Attempts(self._retries, deadline_s))
        try:
            async for line in exchange.lines():
                event = json.loads(line)
                match event.pop("event"):
                    case "progress":
                        yield Progress.of(event)
                    case "error":
                        raise ServiceError.told(event, exchange.request_id)
                    case "result":
                        yield Answer.of(event)
                        return
            raise ConnectionLost(f"{self.url}: the answer ended before the result")
        finally:
            exchange.close()

    async def batch(
        self,
        documents: Items,
        /,
        *,
        in_order: bool = False,
        deadline_s: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Told, None]:
        """Classify any number of documents by one request, and tell what each is answered, by its
        id: an `Answer`, or the ServiceError that it got, while others go on.

        documents: texts, or mappings of `text`, perhaps `id`, and options; iterators of them,
            asynchronous or not, may be endless: some are taken ahead, and answers come meanwhile.
        in_order: in that of the documents, and not as they are done.
        deadline_s: what the service may take for each.
        options: of all documents that do not say otherwise.

        Whoever is slow to take answers slows down the service, which gives up after some time in
        which nothing was taken. Raises what `classify` does, for the batch itself; it is not tried
        again.
        """
        order = {"order": "input"} if in_order else {}
        headers = {"Content-Type": NDJSON}
        request = Request(
            "POST", BATCH, Upload(lines(documents)), query(**options) | order, headers
        )
        exchange = await self._begun(request, Attempts(0, deadline_s))
        try:
            async for line in exchange.lines():
                yield told(line, exchange.request_id)
        finally:
            exchange.close()

    async def info(self, model: str | None = None) -> contract.Info:
        """What runs there: model, labels, limits, versions. Where there are several models, and
        none is named, their names are in `models`, and of each there is nothing."""
        request = Request("GET", "/info", query=query(model=model))
        told: contract.Info = json.loads(await self.ask(request))
        return told

    async def health(self) -> bool:
        """Whether documents are answered: not while the service starts or shuts down.

        Asked once. Raises ConnectionError if it is not there.
        """
        try:
            await self.ask(Request("GET", "/health"), Attempts(0))
        except ServiceError as error:
            if error.status != 503:
                raise
            return False
        return True

    async def session(
        self, name: str | None = None, /, *, model: str | None = None
    ) -> AsyncSession:
        """Begin a document that stays open, which `model` is to read, or return to one by its
        `AsyncSession.id`.

        Raises ServiceError for a session that is not there, or no longer.
        """
        if name is None:
            return await AsyncSession.begin(self, model=model)
        return await AsyncSession.at(self, name)

    async def resume(self, snapshot: bytes) -> AsyncSession:
        """Begin a session where another was when `AsyncSession.snapshot` was asked for."""
        return await AsyncSession.begin(self, snapshot)

    def attempts(self) -> Attempts:
        """As many at one thing as there may be."""
        return Attempts(self._retries)

    async def ask(self, request: Request, attempts: Attempts | None = None) -> bytes:
        """The whole answer to a request, which is sent again where that may help."""
        exchange = await self._begun(request, attempts or self.attempts(), whole=True)
        exchange.close()
        return await exchange.read()

    async def close(self) -> None:
        """Close all connections."""
        if self._http:
            await self._http.close()
            self._http = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _begun(
        self, request: Request, attempts: Attempts, *, whole: bool = False
    ) -> Exchange:
        """An exchange whose answer has begun, or is there `whole`."""
        while True:
            exchange = Exchange(self._opened(), self.url, self._timeout_s)
            try:
                await exchange.begin(request, deadline_s=attempts.left_s)
                if whole:
                    await exchange.read()
            except (ServiceError, ConnectionLost) as error:
                exchange.close()
                if request.upload and not request.upload.again:
                    raise
                await attempts.again(error)
            except BaseException:
                exchange.close()
                raise
            else:
                return exchange

    def _opened(self) -> aiohttp.ClientSession:
        if self._http is None:
            limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
            self._http = aiohttp.ClientSession(headers=self._headers, timeout=limits)
        return self._http


def _classifying(
    document: Document, progress: OnSent | None, options: Options, *, accept: str = JSON
) -> Request:
    headers = {"Content-Type": TEXT, "Accept": accept}
    return Request("POST", DOCUMENTS, Upload(document, progress), query(**options), headers)
