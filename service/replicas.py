"""Workers that are replicas of a Ray Serve deployment, each document on the one that opened it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.request_router import (
    LocalityMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from service.client import Reading, Tokens
from service.document import Progress
from service.errors import NotReady, ServiceError, UnknownDocument
from service.schemas import WorkerInfo

LOST = "the worker that was reading this document is gone: send the document again"


@dataclass(frozen=True)
class Opened:
    """The first thing that a replica says of a document: where it is."""

    replica: str


class RayWorkers:
    """Workers that are replicas of a Serve deployment."""

    def __init__(self, handle: DeploymentHandle[Any], *, timeout_s: float) -> None:
        """`timeout_s`: how long to wait for a replica that takes a document."""
        self._handle = handle
        self._read = handle.options(method_name="read", stream=True)
        self._info = handle.options(method_name="info")
        self._timeout_s = timeout_s

    @asynccontextmanager
    async def open(
        self, document: str, tokens: Tokens, last: bool, *, evidence: bool, running: bool
    ) -> AsyncIterator[Reading]:
        call = self._read.remote(document, tokens, last, evidence, running)
        progress = cast("DeploymentResponseGenerator[Any]", call)
        try:
            async with self._in_time():
                opened: Opened = await anext(progress)
            feed = self._handle.options(method_name="feed", session_id=opened.replica)
            yield RayReading(document, progress, feed)
        finally:
            # Reaches the replica, which closes the document; does nothing once that is done.
            progress.cancel()  # type: ignore[no-untyped-call]

    async def info(self) -> WorkerInfo:
        async with self._in_time():
            info: WorkerInfo = await self._info.remote()
            return info

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._timeout_s):
                with translated():
                    yield
        except TimeoutError:
            raise NotReady("no worker is ready: try again when one has started") from None


class RayReading:
    """A document on one replica of a Serve deployment."""

    def __init__(
        self,
        document: str,
        progress: DeploymentResponseGenerator[Any],
        feed: DeploymentHandle[Any],
    ) -> None:
        self._document = document
        self._progress = progress
        self._feed = feed

    def __aiter__(self) -> AsyncIterator[Progress]:
        return self

    async def __anext__(self) -> Progress:
        with translated():
            progress: Progress = await anext(self._progress)
            return progress

    async def feed(self, offset: int, tokens: Tokens, last: bool) -> None:
        response = self._feed.remote(self._document, offset, tokens, last)
        try:
            with translated():
                await response
        except asyncio.CancelledError:
            response.cancel()  # type: ignore[no-untyped-call]
            raise


class PinnedRouter(LocalityMixin, RequestRouter):
    """Sends a call with a session id to the replica of that id, any other to the least busy one.

    Not Serve's default router with a filter: that one hands a replica to whichever call waits
    longest, not to the call that it was chosen for.

    A replica that is to go, because there are too many or a new version comes, gets no new
    documents; those that it has go on, for what is pinned to it still finds it.
    """

    _turn = 0
    _leaving: dict[ReplicaID, RunningReplica]

    def initialize_state(self, **kwargs: Any) -> None:
        self._leaving = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        staying = {replica.replica_id for replica in replicas}
        known = self._leaving | self.curr_replicas
        self._leaving = {id_: replica for id_, replica in known.items() if id_ not in staying}
        super().update_replicas([*replicas, *self._leaving.values()])

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        self._leaving.pop(replica_id, None)
        super().on_replica_actor_died(replica_id)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        pinned = pending_request.metadata.session_id if pending_request else ""
        if not (pinned and pending_request):
            staying = [r for r in candidate_replicas if r.replica_id not in self._leaving]
            # Of those equally busy, Serve takes the first: they take turns.
            self._turn = (self._turn + 1) % max(1, len(staying))
            return [staying[self._turn :] + staying[: self._turn]]
        chosen = [r for r in candidate_replicas if r.replica_id.unique_id == pinned]
        if chosen:
            return [chosen]
        if not pending_request.future.done():
            pending_request.future.set_exception(UnknownDocument(LOST))
        # Serve looks at the future only after a choice; this one comes to nothing.
        return [candidate_replicas]


@contextmanager
def translated() -> Iterator[None]:
    """Serve's and Ray's errors as the service's own."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task and task.cancelling():
            raise
        raise UnknownDocument(LOST) from None  # the replica's call was cancelled, not ours
    except RayTaskError as error:
        if isinstance(error.cause, ServiceError):
            raise error.cause from None
        raise
    except (RayActorError, RequestCancelledError):
        raise UnknownDocument(LOST) from None
    except DeploymentUnavailableError:
        raise NotReady("no worker is ready: try again when one has started") from None
