"""Sessions: documents that are kept open, and what can be done with them.

Any gateway may be asked for any of them, and any worker may read on: between two appends all of a
session is in the store.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import NamedTuple, TypeVar

from gma.service.errors import (
    BadSnapshot,
    NoSessions,
    SessionGone,
    UnknownSession,
    WrongOffset,
)
from gma.service.gateway.answers import answered, usage_of
from gma.service.gateway.contract import (
    AppendOptions,
    Finding,
    SessionAnswer,
    SessionOptions,
    SessionState,
    Timing,
)
from gma.service.gateway.document import Pieces, milliseconds
from gma.service.gateway.evidence import Share
from gma.service.gateway.gateway import Gateway
from gma.service.gateway.model import Model
from gma.service.gateway.reading import Reading
from gma.service.observe import metrics
from gma.service.sessions.session import Session, session_of, snapshot_of
from gma.service.sessions.store import Store, Stored

T = TypeVar("T")

STORE_THREADS = 16
"""What is done at once in the store of a gateway: it waits for a disk or a network."""

ID_BYTES = 24
"""Random ones of an id: nobody guesses another's."""


class Place(NamedTuple):
    """A session's name for its client and in the store. That is made of its owner too, so to
    another it is not there."""

    id: str
    name: str

    @classmethod
    def of(cls, owner: str, session_id: str) -> Place:
        """`owner`: of the key that asks, the hash; empty if none is asked for."""
        told = f"{owner}/{session_id}".encode(errors="surrogatepass")
        return cls(session_id, hashlib.sha256(told).hexdigest())

    @classmethod
    def new(cls, owner: str) -> Place:
        return cls.of(owner, secrets.token_urlsafe(ID_BYTES))


class Sessions:
    """What a gateway does with sessions. Every method raises ServiceError: NoSessions where there
    can't be any, UnknownSession, SessionGone, StoreFailed, StoreFull."""

    def __init__(self, gateway: Gateway, clock: Callable[[], float] = time.time) -> None:
        self._gateway = gateway
        self._clock = clock
        self._ttl_s = gateway.settings.session_ttl_s
        self._threads = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="sessions")

    async def create(self, owner: str, model: Model) -> SessionState:
        """A new session, of which nothing was read."""
        self.check(model)
        session = Session(await model.fingerprint(), model.name)
        return await self._new(owner, session, "created")

    async def resume(self, owner: str, snapshot: bytes, model: Model | None = None) -> SessionState:
        """A new session that goes on from a snapshot, with `model`, or else with that which it was
        taken of. Raises BadSnapshot."""
        session = await self._in_store(lambda _: session_of(snapshot, self._secret))
        model = model or await self._gateway.models.having(session.model, session.name)
        if model is None or session.model != await model.fingerprint():
            raise BadSnapshot("the snapshot is of another model than runs here")
        self.check(model)
        return await self._new(owner, session._replace(name=model.name), "resumed")

    async def append(
        self,
        owner: str,
        session_id: str,
        offset: int,
        pieces: Pieces,
        options: AppendOptions,
        *,
        began: float,
    ) -> SessionAnswer:
        """Read what `pieces` bring from byte `offset` on, and answer the document so far. It is in
        the store when this returns; nothing has changed if it raises. Raises WrongOffset, and
        whatever `pieces` raises."""
        place = Place.of(owner, session_id)
        stored, session = await self._found(place)
        if offset != session.offset:
            raise WrongOffset(session.offset)
        model = await self._model(session)
        name = f"{session_id[:8]}/{uuid.uuid4().hex}"
        reading = Reading(self._gateway, model, name, session, evidence=options.evidence)
        session = await reading.read(pieces)
        # One that began in time counts, however long it took.
        after = await self._replaced(place, stored, session)
        if after is None:
            raise WrongOffset((await self._found(place))[1].offset)
        self._measure(model, reading, session.offset - offset)
        timing = Timing(
            queue=milliseconds(reading.queue_s),
            tokenize=milliseconds(reading.tokenize_s),
            compute=milliseconds(reading.compute_s),
            total=milliseconds(time.monotonic() - began),
        )
        shares = reading.shares() if options.evidence else []
        answer = partial(self._answer, model, place, after, session, options, shares)
        found = await self._gateway.in_thread(answer) if options.evidence else answer()
        found["timing_ms"] = timing
        return found

    async def answer(self, owner: str, session_id: str, options: SessionOptions) -> SessionAnswer:
        """The document's answer so far."""
        place = Place.of(owner, session_id)
        stored, session = await self._found(place)
        return self._answer(await self._model(session), place, stored, session, options, [])

    async def fork(self, owner: str, session_id: str) -> SessionState:
        """A new session with the same past."""
        _, session = await self._found(Place.of(owner, session_id))
        return await self._new(owner, session, "forked")

    async def snapshot(self, owner: str, session_id: str) -> bytes:
        """All of the session, see `gma.service.sessions.session.snapshot_of`."""
        stored, _ = await self._found(Place.of(owner, session_id))
        return stored.data

    async def delete(self, owner: str, session_id: str) -> None:
        place = Place.of(owner, session_id)
        await self._found(place)

        def delete(store: Store) -> None:
            with _timed("delete"):
                store.delete(place.name)

        await self._in_store(delete)
        metrics.SESSIONS.labels("deleted").inc()

    def check(self, model: Model | None = None) -> None:
        """Raises NoSessions where there can't be any, or not of `model`."""
        models = [model] if model else [*self._gateway.models]
        if models and not any(each.config.causal for each in models):
            raise NoSessions(
                "a bidirectional model reads whole documents, and has no answer so far: send them "
                "to /v1/documents"
            )
        if self._gateway.store is None:
            raise NoSessions(
                "no sessions are kept here: GMA_SESSIONS says where, when the service is started"
            )

    @property
    def _store(self) -> Store:
        self.check()
        assert self._gateway.store
        return self._gateway.store

    @cached_property
    def _secret(self) -> bytes:
        return self._store.secret()

    async def _model(self, session: Session) -> Model:
        """Raises SessionGone if it is no longer there."""
        model = await self._gateway.models.having(session.model, session.name)
        if model is None:
            raise SessionGone(
                "the session was read by another model than runs here now: make a new one"
            )
        return model

    async def _new(self, owner: str, session: Session, event: str) -> SessionState:
        place, expires_at = Place.new(owner), self._expires_at()

        def create(store: Store) -> Stored:
            stored = Stored(snapshot_of(session, self._secret), expires_at)
            with _timed("create"):
                store.create(place.name, stored)
            return stored

        stored = await self._in_store(create)
        metrics.SESSIONS.labels(event).inc()
        return _state(place, stored, session)

    async def _found(self, place: Place) -> tuple[Stored, Session]:
        """Raises UnknownSession, or SessionGone."""

        def read(store: Store) -> tuple[Stored, Session]:
            with _timed("read"):
                stored = store.read(place.name)
            if stored is None:
                raise UnknownSession
            if stored.expires_at <= self._clock():
                metrics.SESSIONS.labels("expired").inc()
                raise SessionGone(
                    f"the session expired at {_written(stored.expires_at)}: make a new one"
                )
            try:
                return stored, session_of(stored.data, self._secret)
            except BadSnapshot as error:
                raise SessionGone(
                    "what is stored of the session is damaged: make a new one"
                ) from error

        return await self._in_store(read)

    async def _replaced(self, place: Place, before: Stored, session: Session) -> Stored | None:
        """What now is in the store in place of `before`; None if that no longer was."""
        # Whatever the clock does, what a client was told is not taken back.
        expires_at = max(before.expires_at, self._expires_at())

        def replace(store: Store) -> Stored | None:
            after = Stored(snapshot_of(session, self._secret), expires_at)
            with _timed("replace"):
                return after if store.replace(place.name, before.version, after) else None

        return await self._in_store(replace)

    def _expires_at(self) -> float:
        return float(int(self._clock() + self._ttl_s))

    async def _in_store(self, act: Callable[[Store], T]) -> T:
        """In a thread that waits for nobody else's text, and lets nobody's wait."""
        store = self._store
        return await asyncio.get_running_loop().run_in_executor(self._threads, act, store)

    def _answer(
        self,
        model: Model,
        place: Place,
        stored: Stored,
        session: Session,
        options: SessionOptions,
        shares: list[Share],
    ) -> SessionAnswer:
        config = model.config
        usage = usage_of(session.read_bytes, session.tokens, session.chunks, None)
        if not len(session.logits):
            found = Finding(model=config.name, scores=[], usage=usage)
        else:
            found = answered(
                config,
                session.logits,
                usage,
                shares,
                top_k=options.top_k,
                evidence=bool(shares),
            )
        state = _state(place, stored, session)
        return SessionAnswer(**state, **found)  # type: ignore[typeddict-item]  # not truncated

    def _measure(self, model: Model, reading: Reading, size: int) -> None:
        metrics.SESSIONS.labels("appended").inc()
        model.answered(size, reading.tokenize_s, reading.queue_s, reading.compute_s)


@contextmanager
def _timed(operation: str) -> Iterator[None]:
    with metrics.SESSION_STORE_SECONDS.labels(operation).time():
        yield


def _state(place: Place, stored: Stored, session: Session) -> SessionState:
    return SessionState(id=place.id, offset=session.offset, expires_at=_written(stored.expires_at))


def _written(seconds: float) -> str:
    """A time as RFC 3339 has it, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
