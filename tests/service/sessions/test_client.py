"""The client and sessions together: over real sockets, against a store, a clock and workers that
do not do what they should. What a text's answer is, is asked in one piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest
from starlette.types import Message, Receive, Scope, Send

from gma import Answer, Client, ServiceError, Session
from gma.service.client import attempts
from gma.service.client.loop import Loop
from gma.service.engine.opening import Opening
from gma.service.link.client import OpenDocument
from gma.service.link.lasting import MOST_LOSSES, LastingWorkers
from tests.service.asgi import TEXT, LocalWorkers, Service
from tests.service.client.served import cut, served
from tests.service.sessions.client import Clock
from tests.service.sessions.failing import full, read_only

DATA = TEXT.encode()
TTL_S = 100


class Losing:
    """The service, which says nothing to the next requests of some methods when it has answered."""

    def __init__(self, service: Service) -> None:
        self._app = service.app
        self.lost: list[str] = []
        self.asked: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def nothing(_: Message) -> None:
            """Tell nobody."""

        if scope["type"] == "http":
            self.asked.append(scope["method"])
            if scope["method"] in self.lost:
                self.lost.remove(scope["method"])
                await self._app(scope, receive, nothing)
                await cut(receive, send)
        await self._app(scope, receive, send)


class Flaky(LocalWorkers):
    """A worker that is lost with the next documents, when it has taken them."""

    def __init__(self, service: Service) -> None:
        super().__init__(service.worker)
        self.losses = 0
        self.opened = 0

    async def open(self, opening: Opening) -> OpenDocument:
        self.opened += 1
        document = await super().open(opening)
        if self.losses:
            self.losses -= 1
            document.close()
        return document


class Running:
    """A service that listens, and what its clients are to know."""

    def __init__(self, checkpoint: Path, store: Path) -> None:
        self.clock = Clock()
        self.loop = Loop()
        self.service = Service(checkpoint, self.clock, sessions=store, session_ttl_s=TTL_S)
        self.workers = Flaky(self.service)
        self.service.model.workers = LastingWorkers(self.workers)
        self.losing = Losing(self.service)

    def check(self, found: Answer, data: bytes) -> None:
        """That an answer is the one to these bytes in one piece, but for its evidence."""
        told = self.loop.call(self.service.classify(data.decode(errors="ignore")))
        right = Answer.of(told)  # type: ignore[arg-type]
        assert found.scores == right.scores
        assert (found.label, found.bytes, found.tokens) == (right.label, right.bytes, right.tokens)

    def held(self, act: Callable[[], None]) -> None:
        """Do something while a step is held."""
        self.loop.call(self.service.runner.step_begun())
        act()
        self.service.runner.go.set()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "PAUSE_S", 0)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "sessions"


@pytest.fixture
def running(checkpoint: Path, store: Path) -> Iterator[Running]:
    found = Running(checkpoint, store)
    found.loop.call(found.service.__aenter__())
    yield found
    found.loop.call(found.service.__aexit__())
    found.loop.close()


@pytest.fixture
def url(running: Running) -> Iterator[str]:
    with served(running.losing, running.loop) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


@pytest.fixture
def session(client: Client) -> Session:
    return client.session()


def refused(status: int, kind: str, act: Callable[[], object]) -> None:
    with pytest.raises(ServiceError) as raised:
        act()
    assert (raised.value.status, raised.value.error_type) == (status, kind)


def test_a_model_may_be_named(client: Client) -> None:
    with client.session(model="tiny") as session:
        assert session.append(DATA).model == "tiny"
    refused(404, "UnknownModel", lambda: client.session(model="x"))


def test_a_document_of_which_no_character_has_come(client: Client, session: Session) -> None:
    for answer in (session.answer(), session.append(b""), session.append(DATA[:1])):
        assert (answer.model, answer.label, answer.scores, answer.bytes) == ("tiny", None, (), 0)
    assert client.session(session.id).offset == 1
    assert session.append(DATA[1:2]).label


class TestAnswersThatAreLost:
    def test_of_an_append_and_its_evidence(self, running: Running, session: Session) -> None:
        session.append(DATA[:100])
        running.losing.lost = ["PATCH"]
        answer = session.append(DATA[100:], evidence=True, top_k=3)
        assert running.losing.asked == ["POST", *["PATCH"] * 4]
        running.check(answer, DATA)
        assert (answer.evidence[0].start, answer.evidence[-1].end) == (0, len(DATA))
        assert session.offset == len(DATA)

    def test_of_everything_else(self, running: Running, client: Client, session: Session) -> None:
        session.append(DATA)
        running.losing.lost = ["GET", "POST", "GET", "POST"]
        running.check(session.answer(), DATA)
        running.check(session.fork().answer(), DATA)
        running.check(client.resume(session.snapshot()).answer(), DATA)
        assert not running.losing.lost
        running.losing.lost = ["DELETE"]
        session.delete()
        refused(404, "UnknownSession", session.answer)


class TestWorkersThatAreLost:
    @pytest.mark.parametrize("losses", [1, 2])
    def test_the_next_one_reads_the_same(
        self, running: Running, session: Session, losses: int
    ) -> None:
        session.append(DATA[:50])
        running.workers.losses, running.workers.opened = losses, 0
        answer = session.append(DATA[50:], evidence=True)
        assert running.workers.opened == losses + 1
        running.check(answer, DATA)
        assert [span.end for span in answer.evidence][-1] == len(DATA)
        assert running.losing.asked == ["POST", "PATCH", "PATCH"]

    def test_too_many_change_nothing(self, running: Running, url: str, session: Session) -> None:
        session.append(DATA[:50])
        running.workers.losses = MOST_LOSSES
        with Client(url, retries=0) as once:
            again = once.session(session.id)
            refused(503, "UnknownDocument", lambda: again.append(DATA[50:]))
        assert not running.workers.losses
        running.check(session.answer(), DATA[:50])
        running.check(session.append(DATA[50:]), DATA)


class TestStores:
    @pytest.mark.parametrize("fails", ["full", "read only"])
    def test_that_take_nothing(
        self,
        running: Running,
        url: str,
        store: Path,
        monkeypatch: pytest.MonkeyPatch,
        fails: str,
    ) -> None:
        error = (507, "StoreFull") if fails == "full" else (503, "StoreFailed")
        with Client(url, retries=0) as client:
            session = client.session()
            session.append(DATA[:50])
            with monkeypatch.context() as patch:
                if fails == "full":
                    full(patch)
                else:
                    read_only(patch, store)
                acts: list[Callable[[], object]] = [
                    lambda: session.append(DATA[50:]),
                    session.fork,
                    client.session,
                    lambda: client.resume(session.snapshot()),
                ]
                for act in acts:
                    refused(*error, act)
                assert (client.session(session.id).offset, session.offset) == (50, 50)
                running.check(session.answer(), DATA[:50])
            running.check(session.append(DATA[50:]), DATA)
        assert not [*store.glob(".new-*")]


class TestClocks:
    def test_that_jump_forwards_and_back(
        self, running: Running, client: Client, session: Session
    ) -> None:
        session.append(DATA[:50])
        running.clock.now += TTL_S
        refused(410, "SessionGone", lambda: session.append(DATA[50:]))
        running.clock.now -= TTL_S
        running.check(session.append(DATA[50:]), DATA)

    def test_that_jump_backwards_take_back_nothing(
        self, running: Running, client: Client, session: Session
    ) -> None:
        until = session.finding()["expires_at"]  # type: ignore[typeddict-item]
        running.clock.now -= 10 * TTL_S
        running.check(session.append(DATA), DATA)
        assert session.finding()["expires_at"] == until  # type: ignore[typeddict-item]
        running.clock.now += 10 * TTL_S + TTL_S - 1
        running.check(session.answer(), DATA)
        running.clock.now += 1
        refused(410, "SessionGone", session.answer)

    def test_that_pass_by_an_append_whose_session_is_removed(
        self, running: Running, session: Session
    ) -> None:
        session.append(DATA[:50])
        running.service.runner.hold()

        def expire() -> None:
            running.clock.now += 3 * TTL_S
            assert running.service.gateway.store
            running.service.gateway.store.sweep(running.clock.now)

        with ThreadPoolExecutor(1) as pool:
            appended = pool.submit(session.append, DATA[50:])
            running.held(expire)
            refused(404, "UnknownSession", appended.result)


class TestSeveral:
    def test_forks_of_forks_while_their_parents_grow(
        self, running: Running, client: Client, session: Session
    ) -> None:
        grown = threading.Event()

        def grow() -> None:
            for start in range(0, len(DATA), 25):
                session.append(DATA[start : start + 25])
            grown.set()

        forks: list[tuple[Session, bytes]] = []
        parent: Session = session
        with ThreadPoolExecutor(1) as pool:
            growing = pool.submit(grow)
            while not grown.is_set():
                fork = parent.fork()
                data = DATA[: fork.offset] if parent is session else forks[-1][1]
                assert fork.offset == len(data)
                rest = DATA[len(data) : len(data) + 3]
                fork.append(rest)
                forks.append((fork, data + rest))
                parent = session if len(forks) % 2 else fork
            growing.result()
        for fork, data in [*forks[-8:], (session, DATA)]:
            running.check(fork.answer(), data)

    def test_writers_at_once_each_lose_nothing(self, running: Running, url: str) -> None:
        """Both write the same, so that who is told of the other's text can't take it for his."""
        with Client(url) as client:
            name = client.session().id
        words = [f"{n} ships, ".encode() for n in range(5)]

        def write(_: int) -> list[tuple[int, bytes]]:
            taken = []
            with Client(url, retries=0) as client:
                session = client.session(name)
                for word in words:
                    while True:
                        begin = session.offset
                        try:
                            session.append(word)
                        except ServiceError as error:
                            if error.error_type != "WrongOffset":
                                raise
                            session = client.session(name)
                        else:
                            taken.append((begin, word))
                            break
            return taken

        with ThreadPoolExecutor(2) as pool:
            taken = sorted(chain(*pool.map(write, range(2))))
        data = b"".join(word for _, word in taken)
        assert len(data) == 2 * sum(map(len, words))
        with Client(url) as client:
            session = client.session(name)
            assert session.offset == len(data)
            running.check(session.answer(), data)
