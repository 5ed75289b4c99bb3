"""Documents that stay open, on a service that loses answers, takes half, or is gone for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from gma import AsyncClient, Client, ServiceError, Session
from tests.service.client.served import served
from tests.service.client.sessions import Sessions

TEXT = "Ça va bien, merci. 漢字も読める。"
DATA = TEXT.encode()


@pytest.fixture
def sessions() -> Sessions:
    return Sessions()


@pytest.fixture
def url(sessions: Sessions) -> Iterator[str]:
    with served(sessions) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


@pytest.fixture
def session(client: Client) -> Session:
    return client.session()


def text_of(sessions: Sessions, session: Session) -> bytes:
    return sessions.texts[session.id]


class TestSession:
    def test_a_document_grows(self, sessions: Sessions, session: Session) -> None:
        answer = session.append(DATA[:1])
        assert (answer.bytes, session.offset) == (1, 1)
        assert session.append(DATA[1:], top_k=3).scores == answer.scores * 3
        assert session.append(TEXT).bytes == session.answer().bytes == 2 * len(DATA)
        assert session.append(b"").bytes == session.offset == 2 * len(DATA)
        assert text_of(sessions, session) == DATA * 2

    def test_it_can_be_returned_to(self, client: Client, session: Session) -> None:
        assert client.session(session.id).offset == 0
        session.append(TEXT)
        again = client.session(session.id)
        assert again.offset == len(DATA)
        assert again.append(TEXT).bytes == 2 * len(DATA)

    def test_fork(self, sessions: Sessions, session: Session) -> None:
        session.append(TEXT)
        fork = session.fork()
        fork.append("x")
        session.append("y")
        assert text_of(sessions, fork) == DATA + b"x"
        assert text_of(sessions, session) == DATA + b"y"

    def test_snapshot(self, client: Client, sessions: Sessions, session: Session) -> None:
        session.append(TEXT)
        snapshot = session.snapshot()
        session.delete()
        resumed = client.resume(snapshot)
        assert resumed.offset == len(DATA)
        resumed.append("x")
        assert text_of(sessions, resumed) == DATA + b"x"

    def test_it_is_deleted_at_the_end(self, client: Client, sessions: Sessions) -> None:
        with client.session() as session:
            session.append(TEXT)
        assert not sessions.texts
        with pytest.raises(ServiceError, match="there is no session"):
            session.answer()

    @pytest.mark.parametrize("error", [ZeroDivisionError, None])
    def test_what_went_wrong_is_told_and_not_what_then_did(
        self, client: Client, sessions: Sessions, error: type[Exception] | None
    ) -> None:
        def failing() -> None:
            with client.session():
                sessions.deletes = False
                if error:
                    raise error

        with pytest.raises(error or ServiceError):
            failing()

    @pytest.mark.parametrize("name", ["none", "../x?y#z"])
    def test_there_is_none(self, client: Client, sessions: Sessions, name: str) -> None:
        with pytest.raises(ServiceError) as raised:
            client.session(name)
        assert raised.value.status == 404
        assert sessions.asked == ["GET 404"]

    @pytest.mark.anyio
    async def test_asynchronously(self, url: str, sessions: Sessions) -> None:
        async with AsyncClient(url) as client:
            async with await client.session() as session:
                await session.append(TEXT)
                assert (await session.answer()).bytes == len(DATA)
                fork = await session.fork()
                resumed = await client.resume(await session.snapshot())
                assert (await client.session(fork.id)).offset == resumed.offset == len(DATA)
            assert sessions.texts.keys() == {fork.id, resumed.id}


class TestFailures:
    """Nothing is lost, and nothing repeated."""

    @pytest.mark.parametrize(
        "faults",
        [
            [(0, 0)],
            [(99, 0)],
            [(5, 0)],
            [(0, 503), (0, 429)],
            [(0, 500)],
            [(99, 500)],
            [(7, 504)],
            [(3, 0), (3, 0), (3, 0)],  # each is known of by a 409
            [(99, 0), (0, 0)],
            [(0, 0), (1, 503), (0, 429), (99, 502)],
        ],
        ids=str,
    )
    def test_of_appending(
        self, sessions: Sessions, session: Session, faults: list[tuple[int, int]]
    ) -> None:
        session.append("before")
        sessions.faults = list(faults)
        answer = session.append(TEXT)
        assert answer.bytes == session.offset == 6 + len(DATA)
        session.append("after")
        assert text_of(sessions, session) == b"before" + DATA + b"after"

    def test_an_answer_that_is_lost(self, sessions: Sessions, session: Session) -> None:
        sessions.lost = {"PATCH"}
        assert session.append(TEXT).bytes == len(DATA)
        assert sessions.asked == ["POST 201", "PATCH 200", "PATCH 409", "PATCH 200"]

    def test_an_append_that_is_still_being_read(self, sessions: Sessions, session: Session) -> None:
        """The connection was lost, and the service has yet to notice."""
        sessions.faults = [(0, 0), (0, 409), (99, 200)]
        assert session.append(TEXT).bytes == len(DATA)
        assert text_of(sessions, session) == DATA

    def test_somebody_else_has_appended(self, client: Client, session: Session) -> None:
        client.session(session.id).append("x" * 10)
        with pytest.raises(ServiceError, match="another offset") as raised:
            session.append(TEXT)
        assert (raised.value.status, raised.value.offset, session.offset) == (409, 10, 0)

    def test_somebody_else_has_appended_while_an_answer_was_lost(
        self, sessions: Sessions, session: Session
    ) -> None:
        sessions.texts[session.id] = b"somebody else's, and much of it"
        sessions.lost = {"PATCH"}
        with pytest.raises(ServiceError, match="another offset"):
            session.append("x")

    def test_text_that_was_acknowledged_is_gone(self, sessions: Sessions, session: Session) -> None:
        session.append(TEXT)
        sessions.texts[session.id] = b""
        sessions.faults = [(0, 0)]
        with pytest.raises(ServiceError, match="another offset"):
            session.append("x")

    def test_they_end(self, sessions: Sessions, session: Session) -> None:
        sessions.faults = [(0, 500)] * 9
        with pytest.raises(ServiceError, match="it is 500"):
            session.append(TEXT)
        assert len(sessions.faults) == 4
        sessions.faults = [(0, 0)] * 9
        with pytest.raises(ConnectionError):
            session.append(TEXT)
        assert len(sessions.faults) == 4

    @pytest.mark.parametrize("status", [400, 404, 410, 413, 422])
    def test_what_trying_again_would_not_help(
        self, sessions: Sessions, session: Session, status: int
    ) -> None:
        sessions.faults = [(0, status)]
        with pytest.raises(ServiceError, match=f"it is {status}"):
            session.append(TEXT)

    def test_answers_to_other_requests_are_lost(
        self, client: Client, sessions: Sessions, session: Session
    ) -> None:
        session.append(TEXT)
        asking: dict[str, Callable[[], object]] = {
            "GET": session.answer,
            "POST": session.fork,
            "DELETE": session.delete,
        }
        for method, ask in asking.items():
            sessions.lost = {method}
            ask()
            assert not sessions.lost
        assert session.id not in sessions.texts
        session.delete()
        with pytest.raises(ServiceError, match="there is no session"):
            session.answer()
