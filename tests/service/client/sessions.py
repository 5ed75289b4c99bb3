"""The routes of sessions, by an application that keeps their text and fails when it is told to."""

from __future__ import annotations

from itertools import count
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from tests.service.client.served import FINDING, answer, cut, lifespan


class Sessions:
    """Appends go through `faults` first, one each: how many of an append's bytes are taken before
    it fails, and with which status, 0 for a connection that is cut."""

    def __init__(self) -> None:
        self.texts: dict[str, bytes] = {}
        self.faults: list[tuple[int, int]] = []
        self.lost: set[str] = set()
        """Methods whose next answer is lost, what was asked for having been done."""
        self.deletes = True
        self.asked: list[str] = []
        self._names = map(str, count(1))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        request = Request(scope, receive)
        body = await request.body()
        _, _, _, *path = scope["path"].split("/")
        status, content = self._answer(request, path, body)
        self.asked.append(f"{request.method} {status}")
        if request.method in self.lost:
            self.lost.remove(request.method)
            status = 0
        if status == 0:
            await cut(receive, send)
        await answer(send, status, content)

    def _answer(self, request: Request, path: list[str], body: bytes) -> tuple[int, object]:
        match request.method, path:
            case "POST", []:
                return 201, self._begin(body)
            case _, [name, *_] if name not in self.texts:
                return 404, {"error": f"there is no session {name}", "error_type": "NoSession"}
            case "PATCH", [name]:
                return self._append(name, request, body)
            case "GET", [name]:
                return self._so_far(name, request)
            case "POST", [name, "fork"]:
                return 201, self._begin(self.texts[name])
            case "GET", [name, "snapshot"]:
                return 200, self.texts[name]
            case "DELETE", _ if not self.deletes:
                return 400, {"error": "not this one", "error_type": "Fault"}
            case "DELETE", [name]:
                del self.texts[name]
                return 204, b""
        raise AssertionError(path)

    def _begin(self, text: bytes) -> object:
        name = next(self._names)
        self.texts[name] = text
        return {"id": name, "offset": len(text), "expires_at": None}

    def _append(self, name: str, request: Request, body: bytes) -> tuple[int, object]:
        taken, status = self.faults.pop(0) if self.faults else (len(body), 200)
        offset = len(self.texts[name])
        if int(request.headers["upload-offset"]) != offset:
            wrong = {"error": "another offset", "error_type": "WrongOffset", "offset": offset}
            return 409, wrong
        self.texts[name] += body[:taken]
        if status == 200:
            return self._so_far(name, request)
        return status, {"error": f"it is {status}", "error_type": "Fault"}

    def _so_far(self, name: str, request: Request) -> tuple[int, object]:
        text = self.texts[name]
        if not text:
            usage = {"bytes": 0, "tokens": 0, "chunks": 0}
            return 200, {"model": FINDING["model"], "scores": [], "usage": usage, "offset": 0}
        usage = {"bytes": len(text), "tokens": 1, "chunks": 1}
        top_k = int(parse_qs(request.url.query).get("top_k", ["1"])[0])
        scores = FINDING["scores"] * top_k
        return 200, {**FINDING, "usage": usage, "scores": scores, "offset": len(text)}
