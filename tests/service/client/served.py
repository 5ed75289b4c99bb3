"""Applications over real sockets, in a thread of their own; and one that does as it is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gma.service.client.loop import Loop
from gma.service.http.listener import Listener
from tests.service.running import free_port

FINDING: dict[str, Any] = {
    "model": "tiny",
    "label": "ann",
    "scores": [{"label": "ann", "score": 0.75, "logit": 1.5}],
    "usage": {"bytes": 3, "tokens": 2, "chunks": 1},
    "timing_ms": {"queue": 0, "tokenize": 0, "compute": 0, "total": 0},
}


@contextmanager
def served(application: ASGIApp, loop: Loop | None = None) -> Iterator[str]:
    """The application's URL."""
    own = loop or Loop()
    port = free_port()
    listener = own.call(Listener.open(application, "127.0.0.1", port))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        own.call(listener.close())
        if not loop:
            own.close()


@dataclass
class Step:
    """What becomes of one request."""

    status: int = 200
    answer: Any = field(default_factory=lambda: FINDING)
    headers: dict[str, str] = field(default_factory=dict)
    reads: int | None = None
    """Bytes of the body that are read before the answer; all by default."""
    then: Callable[[Receive, Send], Any] | None = None
    """In place of the answer."""


async def cut(_: Receive, send: Send) -> None:
    """Close the connection after an answer's head."""
    length = [(b"content-length", b"1000")]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    raise ConnectionAbortedError


def refused(status: int, error_type: str, **headers: str) -> Step:
    """A step that answers as the service refuses."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Step(status, {"error": f"it is {error_type}", "error_type": error_type}, names)


class Scripted:
    """Takes the next step for each request, and notes what was asked."""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)
        self.asked: list[str] = []
        self.headers: list[Headers] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        step = self.steps.pop(0)
        request = Request(scope)
        self.asked.append(f"{request.method} {scope['raw_path'].decode()}")
        self.headers.append(request.headers)
        body = b""
        more = True
        while more and (step.reads is None or len(body) < step.reads):
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        if step.then:
            await step.then(receive, send)
            return
        await answer(send, step.status, step.answer, step.headers)


async def answer(
    send: Send, status: int, content: object, headers: dict[str, str] | None = None
) -> None:
    """Send an answer: JSON, or bytes as they are."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    told = {"content-length": str(len(body)), **(headers or {})}
    raw = [(name.encode(), value.encode()) for name, value in told.items()]
    start: Message = {"type": "http.response.start", "status": status, "headers": raw}
    await send(start)
    await send({"type": "http.response.body", "body": body})


async def lifespan(receive: Receive, send: Send) -> None:
    """Nothing to start or to stop."""
    for event in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{event}.complete"})


async def silence(receive: Receive, _: Send) -> None:
    """Say nothing until the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
