"""The service from programs without asyncio: `from gma import Client`.

It is `AsyncClient` in a thread of its own: a document's answer can come while the document is still
being sent, which is two things at once.
"""

from __future__ import annotations

import weakref
from collections.abc import AsyncGenerator, Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar, Unpack

from gma.service.client.batch import Item, Told
from gma.service.client.client import RETRIES, TIMEOUT_S, AsyncClient
from gma.service.client.loop import Loop
from gma.service.client.options import Options
from gma.service.client.session import AsyncSession
from gma.service.client.upload import Document, OnSent
from gma.service.gateway import contract
from gma.service.python.answer import Answer, Progress

T = TypeVar("T")


class Client:
    """A service that classifies documents.

    ``with Client(url) as client`` closes its connections at the end. Safe to share between threads.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float = TIMEOUT_S,
        retries: int = RETRIES,
    ) -> None:
        """Arguments are those of `AsyncClient`."""
        self._client = AsyncClient(url, key, timeout=timeout, retries=retries)
        self._loop = Loop()
        # At the end of the process too, as long as its other threads are there.
        weakref.finalize(self, _close, self._client, self._loop)

    @property
    def url(self) -> str:
        """Where the service is."""
        return self._client.url

    def classify(
        self,
        document: Document,
        /,
        *,
        deadline_s: float | None = None,
        progress: OnSent | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """Classify a document, as `AsyncClient.classify` does.

        `progress` is called, and an iterator asked for its pieces, in other threads.
        """
        return self._loop.call(
            self._client.classify(document, deadline_s=deadline_s, progress=progress, **options)
        )

    def finding(
        self,
        document: Document,
        /,
        *,
        deadline_s: float | None = None,
        progress: OnSent | None = None,
        **options: Unpack[Options],
    ) -> contract.Answer:
        """The same as the service says it in JSON."""
        return self._loop.call(
            self._client.finding(document, deadline_s=deadline_s, progress=progress, **options)
        )

    def stream(
        self,
        document: Document,
        /,
        *,
        deadline_s: float | None = None,
        progress: OnSent | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Progress | Answer]:
        """Classify a document, and tell how far it was read, as `AsyncClient.stream` does.

        Who stops before the end leaves the document.
        """
        return self._each(
            self._client.stream(document, deadline_s=deadline_s, progress=progress, **options)
        )

    def batch(
        self,
        documents: Iterable[Item],
        /,
        *,
        in_order: bool = False,
        deadline_s: float | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Told]:
        """Classify any number of documents by one request, as `AsyncClient.batch` does.

        An iterator is asked for its documents in another thread. Who stops before the end leaves
        the others.
        """
        return self._each(
            self._client.batch(documents, in_order=in_order, deadline_s=deadline_s, **options)
        )

    def info(self, model: str | None = None) -> contract.Info:
        """What runs there, as `AsyncClient.info` tells it."""
        return self._loop.call(self._client.info(model))

    def health(self) -> bool:
        """Whether documents are answered, as `AsyncClient.health` does."""
        return self._loop.call(self._client.health())

    def session(self, name: str | None = None, /, *, model: str | None = None) -> Session:
        """Begin a document that stays open, which `model` is to read, or return to one by its
        `Session.id`."""
        begun = self._loop.call(self._client.session(name, model=model))
        return Session(begun, self._loop, self)

    def resume(self, snapshot: bytes) -> Session:
        """Begin a session where another was when `Session.snapshot` was asked for."""
        return Session(self._loop.call(self._client.resume(snapshot)), self._loop, self)

    def _each(self, events: AsyncGenerator[T, None]) -> Iterator[T]:
        async def following() -> T | None:
            return await anext(events, None)

        try:
            while event := self._loop.call(following()):
                yield event
        finally:
            self._loop.begin(events.aclose())  # and no waiting: this may be in any thread

    def close(self) -> None:
        """Close all connections."""
        _close(self._client, self._loop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _close(client: AsyncClient, loop: Loop) -> None:
    loop.close(client.close())


class Session:
    """A document on the service that grows, with its answer so far at any time.

    ``with client.session() as session`` deletes it at the end. For one writer.
    """

    def __init__(self, session: AsyncSession, loop: Loop, client: Client) -> None:
        self._session = session
        self._loop = loop
        self._client = client  # which closes the loop when nobody has it any more

    @property
    def id(self) -> str:
        """By which `Client.session` finds it, from anywhere."""
        return self._session.id

    @property
    def offset(self) -> int:
        """How many bytes were appended and acknowledged."""
        return self._session.offset

    def append(self, text: str | bytes, /, **options: Unpack[Options]) -> Answer:
        """Add text to the document, and return what it looks like so far, as
        `AsyncSession.append` does."""
        return self._loop.call(self._session.append(text, **options))

    def answer(self, **options: Unpack[Options]) -> Answer:
        """What the document looks like so far: without labels and scores if it is empty."""
        return self._loop.call(self._session.answer(**options))

    def finding(self, **options: Unpack[Options]) -> contract.Finding:
        """The same as the service says it in JSON."""
        return self._loop.call(self._session.finding(**options))

    def fork(self) -> Session:
        """Another session with the same past, and its own future."""
        return Session(self._loop.call(self._session.fork()), self._loop, self._client)

    def snapshot(self) -> bytes:
        """Its state, for `Client.resume`: some hundred KB, however long the document."""
        return self._loop.call(self._session.snapshot())

    def delete(self) -> None:
        """End it: nothing is kept of it. One that is gone already is no error."""
        self._loop.call(self._session.delete())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call(self._session.__aexit__(kind, error, trace))
