"""Any order of operations on sessions: each says what its own text says, and nothing else does."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from tests.service.asgi import Service
from tests.service.sessions.client import (
    SESSIONS,
    SNAPSHOT,
    Clock,
    OneShot,
    answer,
    append,
    create,
    snapshot,
)

TTL_S = 100

PIECES = st.one_of(
    st.sampled_from(["the sea ", " ships", "\r\n", " " * 40, "漢字", "🚢", "\ufeff", "né"]).map(
        str.encode
    ),
    st.text(max_size=12).map(lambda text: text.encode(errors="ignore")),
    st.binary(max_size=4),
)


class Growth(RuleBasedStateMachine):
    """Sessions beside the bytes that each has got, and snapshots beside those that they had."""

    service: ClassVar[Service]
    one: ClassVar[OneShot]
    clock: ClassVar[Clock]
    runner: ClassVar[asyncio.Runner]

    sessions = Bundle("sessions")
    snapshots = Bundle("snapshots")

    def __init__(self) -> None:
        super().__init__()
        self.data: dict[str, bytes] = {}
        self.until: dict[str, float] = {}

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def begin(self, session: str, data: bytes) -> str:
        self.data[session], self.until[session] = data, self.clock.now + TTL_S
        return session

    def lives(self, session: str) -> bool:
        return self.clock.now < self.until[session]

    @rule(target=sessions)
    def create(self) -> str:
        return self.begin(self.run(create(self.service)), b"")

    @rule(session=sessions, piece=PIECES, cut=st.integers(0, 12))
    def append(self, session: str, piece: bytes, cut: int) -> None:
        for part in filter(None, (piece[:cut], piece[cut:])):
            data = self.data[session]
            response = self.run(append(self.service, session, len(data), part))
            if not self.lives(session):
                assert response.status_code == 410
            elif broken(data + part):
                assert (response.status_code, response.json()["error_type"]) == (400, "NotUtf8")
            else:
                assert response.status_code == 200, response.text
                self.begin(session, data + part)
                self.run(self.one.check(response.json(), data + part))

    @rule(session=sessions, by=st.integers(-9, 9).filter(bool), piece=PIECES)
    def append_elsewhere(self, session: str, by: int, piece: bytes) -> None:
        offset = len(self.data[session]) + by
        if offset >= 0 and self.lives(session):
            response = self.run(append(self.service, session, offset, piece))
            assert response.status_code == 409
            assert response.headers["upload-offset"] == str(len(self.data[session]))

    @rule(target=sessions, session=sessions)
    def fork(self, session: str) -> Any:
        response = self.run(self.service.http.post(f"{SESSIONS}/{session}/fork"))
        if not self.lives(session):
            assert response.status_code == 410
            return multiple()
        assert response.status_code == 201
        return self.begin(response.json()["id"], self.data[session])

    @rule(target=snapshots, session=sessions)
    def take(self, session: str) -> Any:
        if not self.lives(session):
            return multiple()
        return self.run(snapshot(self.service, session)), self.data[session]

    @rule(target=sessions, taken=snapshots)
    def resume(self, taken: tuple[bytes, bytes]) -> str:
        given, data = taken
        return self.begin(self.run(create(self.service, content=given, headers=SNAPSHOT)), data)

    @rule(session=consumes(sessions))
    def delete(self, session: str) -> None:
        response = self.run(self.service.http.delete(f"{SESSIONS}/{session}"))
        assert response.status_code == (204 if self.lives(session) else 410)
        del self.data[session], self.until[session]

    @rule(seconds=st.sampled_from([1, 60]))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @invariant()
    def each_says_what_its_text_says(self) -> None:
        for session, data in self.data.items():
            if self.lives(session):
                self.run(self.one.check(self.run(answer(self.service, session)), data))


def broken(data: bytes) -> bool:
    """Whether no bytes to come make it UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason != "unexpected end of data"
    return False


@pytest.fixture
def growing(checkpoint: Path, tmp_path: Path) -> Iterator[None]:
    clock = Clock()
    service = Service(checkpoint, clock, sessions=tmp_path / "sessions", session_ttl_s=TTL_S)
    Growth.service, Growth.one, Growth.clock = service, OneShot(service), clock
    with asyncio.Runner() as runner:
        Growth.runner = runner
        runner.run(service.__aenter__())
        yield
        runner.run(service.__aexit__())


@pytest.mark.usefixtures("growing")
def test_sessions_grow_by_themselves() -> None:
    run_state_machine_as_test(
        Growth,
        settings=settings(
            max_examples=12,
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=[*HealthCheck],
        ),
    )
