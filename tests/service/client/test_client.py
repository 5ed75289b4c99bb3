"""A service from Python: `from gma import Client, AsyncClient`."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

from gma import Answer, AsyncClient, Classifier, Client, Progress, ServiceError
from gma.service.client import upload
from tests.service.asgi import LABELS, PATIENCE_S, TEXT, Service
from tests.service.client.served import FINDING, Scripted, Step, cut, refused, served, silence
from tests.service.running import free_port

LONG = (TEXT * 40).encode()
Begin = Callable[[Scripted], Client]


def pieces(size: int = 1000) -> Iterator[bytes]:
    for start in range(0, len(LONG), size):
        yield LONG[start : start + size]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "long.txt"
    file.write_bytes(LONG)
    return file


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Answer:
    return Classifier.load(checkpoint, device="cpu").classify(LONG.decode())


class TestClassify:
    def check(self, answer: Answer, expected: Answer) -> None:
        assert (answer.model, answer.labels) == (expected.model, expected.labels)
        assert (answer.bytes, answer.tokens) == (expected.bytes, expected.tokens)
        for one, other in zip(answer.scores, expected.scores, strict=True):
            assert one.label == other.label
            assert one.logit == pytest.approx(other.logit, abs=1e-4)

    @pytest.mark.parametrize(
        "document",
        [
            LONG.decode(),
            LONG,
            bytearray(LONG),
            memoryview(LONG),
            io.BytesIO(LONG),
            io.BytesIO(gzip.compress(LONG)),
            list(pieces()),
            [b"", *pieces(), b""],
        ],
        ids=lambda document: type(document).__name__,
    )
    def test_a_document_in_memory(self, client: Client, document: Any, expected: Answer) -> None:
        if isinstance(document, io.BytesIO) and document.getvalue() != LONG:
            document = gzip.GzipFile(fileobj=document)
        self.check(client.classify(document), expected)

    def test_files_and_iterators(self, client: Client, file: Path, expected: Answer) -> None:
        self.check(client.classify(file), expected)
        self.check(client.classify(pieces()), expected)
        with file.open("rb") as opened:
            self.check(client.classify(opened), expected)
        with file.open("rb", buffering=0) as opened:
            self.check(client.classify(opened), expected)

    def test_a_file_from_where_it_is(self, client: Client, file: Path) -> None:
        with file.open("rb") as opened:
            opened.seek(1000)
            assert client.classify(opened).bytes == len(LONG) - 1000

    def test_a_pipe(self, client: Client, expected: Answer) -> None:
        read, write = os.pipe()
        with os.fdopen(read, "rb") as reader, os.fdopen(write, "wb") as writer:

            def fill() -> None:
                writer.write(LONG)
                writer.close()

            writing = threading.Thread(target=fill)
            writing.start()
            self.check(client.classify(reader), expected)
            writing.join()

    @pytest.mark.anyio
    async def test_asynchronously(self, url: str, file: Path, expected: Answer) -> None:
        async def arriving() -> AsyncIterator[bytes]:
            for piece in pieces():
                yield piece

        async with AsyncClient(url) as client:
            documents: list[Any] = [LONG, file, pieces(), arriving(), LONG.decode()]
            for answer in await asyncio.gather(*map(client.classify, documents)):
                self.check(answer, expected)

    def test_options(self, client: Client) -> None:
        answer = client.classify(
            LONG, model="tiny", top_k=2, evidence=True, components=True, max_tokens=1000
        )
        assert (len(answer.scores), answer.tokens, answer.truncated) == (2, 1000, True)
        assert len(answer.evidence) > 1
        assert answer.components
        plain = client.classify(LONG, evidence=False)
        assert (plain.evidence, plain.components, plain.truncated) == ((), None, False)
        with pytest.raises(TypeError, match="topk"):
            client.classify(LONG, topk=2)  # type: ignore[call-arg]

    def test_as_the_service_says_it(self, client: Client) -> None:
        finding = client.finding(LONG)
        assert finding["timing_ms"]["total"] > 0
        assert Answer.of(finding) == client.classify(LONG)

    def test_it_tells_how_much_was_sent(
        self, client: Client, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(upload, "PIECE_BYTES", 4000)
        told: list[tuple[int, int | None]] = []
        client.classify(file, progress=lambda *sent: told.append(sent))
        assert told == sorted(set(told))
        assert {size for _, size in told} == {len(LONG)}
        assert told[-1] == (len(LONG), len(LONG))
        told.clear()
        client.classify(LONG, progress=lambda *sent: told.append(sent))
        assert told[:2] == [(4000, len(LONG)), (8000, len(LONG))]
        told.clear()
        client.classify(pieces(), progress=lambda *sent: told.append(sent))
        *_, last = told
        assert last == (len(LONG), None)

    def test_threads_share_a_client(self, client: Client, expected: Answer) -> None:
        answers: list[Answer] = []
        threads = [
            threading.Thread(target=lambda: answers.append(client.classify(pieces())))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 4
        for answer in answers:
            self.check(answer, expected)


class TestStream:
    def test_progress_comes_while_the_document_is_sent(self, client: Client) -> None:
        seen = threading.Event()

        def document() -> Iterator[bytes]:
            yield LONG
            assert seen.wait(PATIENCE_S)
            yield LONG

        events = []
        for event in client.stream(document(), top_k=1):
            seen.set()
            events.append(event)
        *progress, answer = events
        assert isinstance(answer, Answer)
        assert (answer.bytes, len(answer.scores)) == (2 * len(LONG), 1)
        assert isinstance(progress[0], Progress)
        assert 0 < progress[0].bytes <= len(LONG)
        assert progress[0].label in LABELS
        assert progress[0].labels == (progress[0].label,)

    @pytest.mark.anyio
    async def test_asynchronously(self, url: str) -> None:
        seen = asyncio.Event()

        async def document() -> AsyncIterator[bytes]:
            yield LONG
            await seen.wait()
            yield LONG

        async with AsyncClient(url) as client:
            events = client.stream(document())
            assert isinstance(await anext(events), Progress)
            seen.set()
            *_, answer = [event async for event in events]
        assert isinstance(answer, Answer)

    def test_who_leaves_is_not_read_on(self, client: Client, running: tuple[Service, str]) -> None:
        left = threading.Event()

        def document() -> Iterator[bytes]:
            yield LONG
            assert left.wait(PATIENCE_S)

        for _ in client.stream(document()):
            break
        service, _ = running
        asyncio.run(service.until("gma_documents_in_flight", 0))
        left.set()

    def test_what_goes_wrong_after_the_first_event(self, client: Client) -> None:
        seen = threading.Event()

        def document() -> Iterator[bytes]:
            yield LONG
            assert seen.wait(PATIENCE_S)
            yield b"\xff"

        events = client.stream(document())
        assert isinstance(next(events), Progress)
        seen.set()
        with pytest.raises(ServiceError, match=f"not UTF-8 at byte {len(LONG)}") as raised:
            list(events)
        assert (raised.value.status, raised.value.error_type) == (400, "NotUtf8")
        assert raised.value.request_id

    def test_an_answer_that_ends_early(self, scripted: Begin) -> None:
        event = b'{"event": "progress", "bytes": 1, "tokens": 1}\n'
        events = scripted(Scripted(Step(answer=event))).stream(b"abc")
        assert next(events) == Progress(1, 1, None, (), None)
        with pytest.raises(ConnectionError, match="ended before the result"):
            next(events)

    def test_lines_of_any_length(self, scripted: Begin) -> None:
        label = "x" * 2**20
        answer = {**FINDING, "label": label, "event": "result"}
        (event,) = scripted(Scripted(Step(answer=answer))).stream(b"abc")
        assert event.label == label


class TestErrors:
    @pytest.mark.parametrize(
        ("document", "options", "status", "error_type"),
        [
            (b"", {}, 400, "Empty"),
            (b"abc\xff", {}, 400, "NotUtf8"),
            (LONG, {"top_k": -1}, 422, "Validation"),
            (LONG, {"model": "x"}, 404, "UnknownModel"),
            (b"x" * 2**21, {}, 413, "TooLarge"),
        ],
    )
    def test_what_the_service_says(
        self, client: Client, document: bytes, options: Any, status: int, error_type: str
    ) -> None:
        for ask in client.classify, lambda *x, **y: list(client.stream(*x, **y)):
            with pytest.raises(ServiceError) as raised:
                ask(document, **options)
            error = raised.value
            assert (error.status, error.error_type) == (status, error_type)
            assert error.message == str(error) != ""
            assert error.request_id
            assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301

    def test_an_answer_that_comes_before_all_was_sent(self, client: Client) -> None:
        """And what never was in memory, nor ever ends."""
        taken = 0

        def endless() -> Iterator[bytes]:
            nonlocal taken
            while True:
                taken += 2**16
                yield b"x" * 2**16

        with pytest.raises(ServiceError, match="larger than the limit") as raised:
            client.classify(endless())
        assert raised.value.status == 413
        assert taken < 2**26

    def test_an_answer_while_nothing_more_comes(self, client: Client) -> None:
        never = threading.Event()

        def waiting() -> Iterator[bytes]:
            yield b"x" * 2**21
            never.wait()

        with pytest.raises(ServiceError, match="larger than the limit"):
            client.classify(waiting())
        never.set()

    def test_keys(self, scripted: Begin) -> None:
        application = Scripted(Step(), refused(401, "Unauthorized"))
        client = scripted(application)
        client.classify(b"abc")
        assert application.headers[0]["authorization"] == "Bearer secret"
        with pytest.raises(ServiceError, match="it is Unauthorized"):
            client.classify(b"abc")

    def test_an_answer_that_is_not_the_services(self, scripted: Begin) -> None:
        page = Step(504, b"<h1>Gateway\n  time-out</h1>")
        with pytest.raises(ServiceError, match=r"504.*<h1>Gateway time-out</h1>") as raised:
            scripted(Scripted(page)).classify(b"abc")
        assert raised.value.error_type is None

    def test_another_place_is_not_gone_to(self, scripted: Begin) -> None:
        with pytest.raises(ServiceError, match="307"):
            scripted(Scripted(Step(307, b"", {"location": "/"}))).classify(b"abc")

    def test_nobody_is_there(self) -> None:
        url = f"http://127.0.0.1:{free_port()}"
        with Client(url) as client:
            for ask in client.info, client.health, lambda: client.classify(pieces()):
                with pytest.raises(ConnectionError, match=url):
                    ask()

    def test_silence(self) -> None:
        with (
            served(Scripted(Step(then=silence))) as url,
            Client(url, timeout=0.1) as client,
            pytest.raises(TimeoutError, match=r"nothing has happened for 0\.1 s"),
        ):
            client.classify(b"abc")

    def test_a_document_may_be_waited_for(self) -> None:
        def slow() -> Iterator[bytes]:
            yield b"abc"
            threading.Event().wait(1.2)
            yield b"def"

        application = Scripted(Step())
        with served(application) as url, Client(url, timeout=1) as client:
            client.classify(slow())
        assert application.bodies == [b"abcdef"]

    @pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://service"])
    def test_what_is_no_url(self, url: str) -> None:
        with pytest.raises(ValueError, match="a URL is like"):
            Client(url)


class TestSources:
    class Broken(ConnectionError):
        pass

    def test_what_goes_wrong_there(self, client: Client) -> None:
        def broken() -> Iterator[bytes]:
            yield b"abc"
            raise self.Broken("the disk is on fire")

        with pytest.raises(self.Broken, match="on fire"):
            client.classify(broken())
        with pytest.raises(self.Broken, match="on fire"):
            list(client.stream(broken()))

    @pytest.mark.anyio
    async def test_what_goes_wrong_there_asynchronously(self, url: str) -> None:
        async def broken() -> AsyncIterator[bytes]:
            yield b"abc"
            raise TimeoutError("the disk is slow")

        async with AsyncClient(url) as client:
            with pytest.raises(TimeoutError, match="disk is slow"):
                await client.classify(broken())

    def test_what_goes_wrong_in_a_callback(self, client: Client) -> None:
        def callback(sent: int, size: int | None) -> None:
            client.health()

        with pytest.raises(RuntimeError, match="a callback of the client"):
            client.classify(LONG, progress=callback)

    def test_files_that_cannot_be_read(self, client: Client, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="missing"):
            client.classify(tmp_path / "missing")
        with pytest.raises(IsADirectoryError):
            client.classify(tmp_path)

    def test_a_file_that_changes(self, scripted: Begin) -> None:
        """It is sent as it was when it was looked at, or not at all."""
        application = Scripted(Step())
        client = scripted(application)

        class Changing(io.BytesIO):
            def __init__(self, becomes: bytes) -> None:
                super().__init__(LONG)
                self.becomes = becomes

            def read1(self, size: int | None = -1, /) -> bytes:
                becomes, self.becomes = self.becomes, b""
                return becomes

        client.classify(Changing(LONG + b"more"))
        assert application.bodies == [LONG]
        with pytest.raises(OSError, match=f"the file had {len(LONG)} bytes, and has 10 now"):
            client.classify(Changing(LONG[:10]))

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            (io.StringIO("abc"), "open it in binary mode"),
            (["abc"], "pieces of a document are bytes, not str"),
            (3, "a document is a text, .* not int"),
        ],
    )
    def test_what_is_no_document(self, client: Client, document: Any, message: str) -> None:
        with pytest.raises(TypeError, match=message):
            client.classify(document)

    def test_a_string_is_no_path(self, client: Client, file: Path) -> None:
        assert client.classify(str(file)).bytes == len(str(file))


class TestRetries:
    BUSY = refused(503, "NotReady", retry_after="0")

    @pytest.mark.parametrize(
        "failure",
        [
            BUSY,
            refused(429, "Overloaded", retry_after="0"),
            Step(502, b"bad gateway"),
            Step(then=cut),
            Step(reads=100_000, then=cut),
        ],
    )
    def test_what_can_be_sent_again_is(
        self, scripted: Begin, failure: Step, tmp_path: Path
    ) -> None:
        data = LONG * 20
        (tmp_path / "long").write_bytes(data)
        application = Scripted(failure, failure, Step(), failure, Step(), failure, Step())
        client = scripted(application)
        assert client.classify(data).label == "ann"
        assert client.classify(tmp_path / "long").label == "ann"
        opened = io.BytesIO(b"abc" + data)
        opened.seek(3)
        assert client.classify(opened).label == "ann"
        assert [application.bodies[each] == data for each in (2, 4, 6)] == [True] * 3

    @pytest.mark.parametrize("failure", [BUSY, Step(then=cut)])
    def test_an_iterator_is_not(self, scripted: Begin, failure: Step) -> None:
        application = Scripted(failure)
        with pytest.raises((ServiceError, ConnectionError)):
            scripted(application).classify(pieces())
        assert len(application.asked) == 1

    def test_they_end(self, scripted: Begin) -> None:
        application = Scripted(*[self.BUSY] * 9)
        with pytest.raises(ServiceError, match="it is NotReady") as raised:
            scripted(application).classify(b"abc")
        assert raised.value.retry_after_s == 0
        assert len(application.asked) == 5

    @pytest.mark.parametrize(
        "failure",
        [
            refused(429, "AllowanceSpent", retry_after="3600"),
            refused(400, "NotUtf8"),
            refused(500, "StepFailed"),
            refused(504, "TooLate"),
        ],
    )
    def test_what_they_would_not_help(self, scripted: Begin, failure: Step) -> None:
        application = Scripted(failure)
        with pytest.raises(ServiceError):
            scripted(application).classify(b"abc")
        assert len(application.asked) == 1

    def test_the_deadline_is_told_and_ends_them(self, scripted: Begin) -> None:
        application = Scripted(self.BUSY, refused(503, "NotReady", retry_after="31"))
        with pytest.raises(ServiceError, match="NotReady"):
            scripted(application).classify(b"abc", deadline_s=30)
        first, second = (int(told["x-deadline-ms"]) for told in application.headers)
        assert 30_000 >= first >= second > 0

    def test_of_a_stream_before_it_begins(self, scripted: Begin) -> None:
        application = Scripted(self.BUSY, Step(answer={**FINDING, "event": "result"}))
        (answer,) = scripted(application).stream(b"abc")
        assert isinstance(answer, Answer)

    @pytest.mark.anyio
    async def test_a_connection_that_is_closed_at_once(self) -> None:
        connections = 0

        async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            writer.close()

        server = await asyncio.start_server(close, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, AsyncClient(f"http://127.0.0.1:{port}", retries=2) as client:
            with pytest.raises(ConnectionError):
                await client.classify(b"abc")
        assert connections == 3


class TestOperation:
    def test_info(self, client: Client, url: str) -> None:
        assert client.info()["labels"] == list(LABELS)
        assert client.url == url
        assert client.info("tiny")["models"] == ["tiny"]

    def test_health(self, client: Client, scripted: Begin) -> None:
        assert client.health()
        application = Scripted(refused(503, "NotReady", retry_after="5"), refused(500, "Internal"))
        starting = scripted(application)
        assert not starting.health()
        with pytest.raises(ServiceError):
            starting.health()

    def test_a_client_that_was_closed_connects_again(self, url: str) -> None:
        client = Client(url)
        assert client.health()
        client.close()
        assert client.health()
        client.close()


def test_who_still_waits_when_the_client_is_closed(scripted: Begin) -> None:
    client = scripted(Scripted(Step(then=silence)))
    with pytest.raises(CancelledError):
        client.classify(b"abc", progress=lambda *_: threading.Thread(target=client.close).start())


def test_who_never_closes_a_client_hears_no_complaint(url: str) -> None:
    code = f"import gma\nclient = gma.Client({url!r})\nassert client.classify(b'abc').bytes == 3"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_imports_are_light() -> None:
    code = (
        "import sys, gma\n"
        "assert 'aiohttp' not in sys.modules\n"
        "from gma import AsyncClient, Client, ServiceError\n"
        "assert not {'torch', 'ray', 'fastapi'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
