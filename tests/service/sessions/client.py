"""A client of sessions, and the answer that its text has in one piece."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from tests.service.asgi import Service

SESSIONS = "/v1/sessions"
SNAPSHOT = {"content-type": "application/octet-stream"}


class Clock:
    """Seconds since 1970 as a test says."""

    now = 1.8e9

    def __call__(self) -> float:
        return self.now


async def create(service: Service, **options: Any) -> str:
    response = await service.http.post(SESSIONS, **options)
    assert response.status_code == 201, response.text
    assert response.headers["location"] == f"{SESSIONS}/{response.json()['id']}"
    session: str = response.json()["id"]
    return session


async def append(
    service: Service,
    session: str,
    offset: int | str,
    data: bytes,
    headers: Mapping[str, str] | None = None,
    **parameters: Any,
) -> httpx.Response:
    return await service.http.patch(
        f"{SESSIONS}/{session}",
        content=data,
        params=parameters,
        headers={"content-type": "text/plain", "upload-offset": str(offset), **(headers or {})},
    )


async def answer(service: Service, session: str, **parameters: Any) -> dict[str, Any]:
    response = await service.http.get(f"{SESSIONS}/{session}", params=parameters)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    assert response.headers["upload-offset"] == str(found["offset"])
    return found


async def snapshot(service: Service, session: str) -> bytes:
    response = await service.http.get(f"{SESSIONS}/{session}/snapshot")
    assert response.status_code == 200, response.text
    return response.content


def whole(data: bytes) -> bytes:
    """All but a last character that is unfinished."""
    return data.decode(errors="ignore").encode() if data else data


SAID = ("model", "label", "scores", "usage")


class OneShot:
    """The answers of texts that are sent in one piece, each asked for once."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._known: dict[bytes, dict[str, Any]] = {}

    async def check(self, found: Mapping[str, Any], data: bytes) -> None:
        """That a session with these bytes is answered as they are, to the last bit."""
        assert found["offset"] == len(data)
        text = whole(data)
        if not text:
            usage = {"bytes": 0, "tokens": 0, "chunks": 0}
            assert (found["model"], found["scores"], found["usage"]) == ("tiny", [], usage)
            assert "label" not in found
            return
        if text not in self._known:
            answer = await self._service.classify(text)
            self._known[text] = {name: answer[name] for name in SAID}
        assert {name: found[name] for name in SAID} == self._known[text]
