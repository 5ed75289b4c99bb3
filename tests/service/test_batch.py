"""POST /v1/documents:batch, through ASGI, with a real engine and a tiny model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from starlette.types import Message

from gma.service.errors import ShuttingDown
from gma.service.gateway import admission, document
from gma.service.gateway.contract import Failure, LineAnswer, LineFailure
from gma.service.gateway.document import Document, Pieces
from gma.service.gateway.spending import Spending
from gma.service.http import body
from gma.service.http.batch import TOGETHER
from gma.service.http.keys import hash_of
from gma.service.http.lines import Lines
from tests.service.answers import PLAIN, same
from tests.service.asgi import PATIENCE_S, TEXT, Exchange, Service

pytestmark = pytest.mark.anyio

PATH = "/v1/documents:batch"
NDJSON = {"content-type": "application/x-ndjson"}
GOOD = b'{"text": "a"}\n'


MOST_AHEAD = body.AHEAD_BYTES + (TOGETHER + 30) * len(GOOD)
"""Bytes that are taken, in pieces of ten lines, before an answer is."""


def line(text: str = "a", **members: Any) -> bytes:
    """A line as it is sent."""
    return json.dumps({**members, "text": text}, ensure_ascii=False).encode() + b"\n"


async def post(service: Service, *lines: bytes, query: str = "", **headers: str) -> list[Any]:
    """The answers, in order of the lines."""
    response = await service.http.post(
        PATH + query, content=b"".join(lines), headers={**NDJSON, **headers}
    )
    assert response.status_code == 200, response.text
    answers = [json.loads(each) for each in response.text.splitlines()]
    return sorted(answers, key=lambda answer: answer["line"])


async def answer(exchange: Exchange) -> Any:
    """The next answer; None at the end."""
    message = await exchange.message()
    if message["type"] == "http.response.start":
        assert message["status"] == 200
        message = await exchange.message()
    assert bool(message["body"]) or not message["more_body"]
    return json.loads(message["body"]) if message["body"] else None


async def whole(lines: Lines) -> bytes:
    """What is left of a line."""
    return b"".join([piece async for piece, _ in lines.pieces()])


async def check_free(service: Service) -> None:
    """Check that nothing is held any more."""
    assert service.gateway.admission.documents == 0
    assert service.gateway.admission.bytes == 0
    await service.until("gma_slots_in_use", 0)
    # A batch may have as many places as before.
    assert len(await post(service, *[GOOD] * 8)) == 8


class TestAnswer:
    async def test_each_line_is_answered_like_a_document(self, service: Service) -> None:
        texts = ["a", "Ça va?", TEXT, '🚢 \n\t"quoted"']
        answers = await post(service, *map(line, texts))
        for number, (text, found) in enumerate(zip(texts, answers, strict=True), 1):
            TypeAdapter(LineAnswer).validate_python(found, strict=True)
            assert (found["line"], found["id"]) == (number, number)
            assert same(found, await service.classify(text))

    @pytest.mark.parametrize("id", ["a", "", "ü" * 256, 'a"\\\n', 0, -(2**63), 2**63 - 1])
    async def test_its_id_comes_back(self, service: Service, id: str | int) -> None:
        (found,) = await post(service, line(id=id))
        assert found["id"] == id
        (failed,) = await post(service, line("", id=id))
        TypeAdapter(LineFailure).validate_python(failed, strict=True)
        assert (failed["id"], failed["error_type"]) == (id, "Empty")

    @pytest.mark.parametrize("id", [True, 1.5, [], {}, 2**63, "a" * 257, "a" * 5000])
    async def test_what_is_no_id(self, service: Service, id: Any) -> None:
        failed, _ = await post(service, line(id=id), GOOD)
        assert (failed["id"], failed["line"], failed["error_type"]) == (1, 1, "Validation")
        assert len(failed["error"]) < 200

    async def test_a_line_without_one_has_its_number(self, service: Service) -> None:
        answers = await post(service, b"\n \r\n", GOOD, b"\n", line(id=None))
        assert [(each["line"], each["id"]) for each in answers] == [(3, 3), (5, 5)]

    async def test_its_options_count_before_those_of_the_query(self, service: Service) -> None:
        lines = line(), line(top_k=1), line(TEXT, evidence=True)
        one, two, three = await post(service, *lines, query="?top_k=2")
        assert [len(each["scores"]) for each in (one, two, three)] == [2, 1, 2]
        assert "evidence" not in one
        assert three["evidence"]

    @pytest.mark.parametrize("body", [b"", b"\n", b" \r\n\n"])
    async def test_to_nothing_is_nothing(self, service: Service, body: bytes) -> None:
        assert await post(service, body) == []

    async def test_the_last_line_need_not_end(self, service: Service) -> None:
        assert len(await post(service, GOOD, GOOD.strip())) == 2

    @pytest.mark.parametrize(("order", "first"), [("done", 2), ("input", 1)])
    async def test_order(self, service: Service, order: str, first: int) -> None:
        service.runner.hold()
        async with Exchange(service.app, f"{PATH}?order={order}", NDJSON) as exchange:
            exchange.send(line(TEXT * 4) + GOOD, last=True)
            await service.until("gma_slots_in_use", 2)
            service.runner.go.set()
            found = [(await answer(exchange))["line"] for _ in range(2)]
            assert found == [first, 3 - first]
            assert await answer(exchange) is None

    async def test_answers_come_while_lines_are_sent(self, service: Service) -> None:
        async with Exchange(service.app, PATH, NDJSON) as exchange:
            for number in range(1, 4):
                exchange.send(line(id=f"n{number}"))
                assert (await answer(exchange))["id"] == f"n{number}"
            exchange.send(b"", last=True)
            assert await answer(exchange) is None
        await check_free(service)

    async def test_cut_at_every_byte(self, service: Service) -> None:
        lines = line("Ça", id="ü"), b"no\n", line("b")
        async with Exchange(service.app, f"{PATH}?order=input", NDJSON) as exchange:
            for byte in b"".join(lines):
                exchange.send(bytes([byte]))
            exchange.send(b"", last=True)
            found = [await answer(exchange) for _ in range(3)]
        assert [each["id"] for each in found] == ["ü", 2, 3]
        assert same(found[0], await service.classify("Ça"))
        assert same(found[2], await service.classify("b"))

    @pytest.mark.parametrize(
        ("headers", "query", "status"),
        [
            ({}, "", 415),
            ({"content-type": "application/json"}, "", 415),
            ({**NDJSON, "content-encoding": "br"}, "", 415),
            (NDJSON, "?order=some", 422),
            (NDJSON, "?id=1", 422),
            (NDJSON, "?top_k=1&top_k=2", 422),
        ],
    )
    async def test_what_is_no_batch(
        self, service: Service, headers: dict[str, str], query: str, status: int
    ) -> None:
        response = await service.http.post(PATH + query, content=GOOD, headers=headers)
        assert response.status_code == status
        await check_free(service)

    async def test_is_counted_and_described(self, service: Service) -> None:
        async def counted() -> list[float]:
            text = (await service.http.get("/metrics")).text.splitlines()
            found = dict(each.rsplit(" ", 1) for each in text)
            names = [f'gma_batch_lines_total{{status="{status}"}}' for status in (200, 400)]
            return [float(found.get(name, 0)) for name in (*names, "gma_admissions_total")]

        before = await counted()
        await post(service, GOOD, b"{\n", GOOD)
        assert await counted() == [each + n for each, n in zip(before, (2, 1, 3), strict=True)]
        described = (await service.http.get("/openapi.json")).json()["paths"][PATH]["post"]
        assert NDJSON["content-type"] in described["requestBody"]["content"]
        assert {"order", "top_k", "x-deadline-ms"} <= {x["name"] for x in described["parameters"]}


class TestBadLines:
    @pytest.mark.parametrize(
        ("bad", "status", "error_type"),
        [
            (b"{", 400, "NotJson"),
            (b"nothing", 422, "Validation"),
            (b"[]", 422, "Validation"),
            (b'"text"', 422, "Validation"),
            (b"{}", 422, "Validation"),
            (b'{"text": ""}', 400, "Empty"),
            (b'{"text": "a"} {"text": "b"}', 400, "NotJson"),
            (b'{"text": "a', 400, "NotJson"),
            (b'{"text": "\xff"}', 400, "NotUtf8"),
            (b'{"text": "a", "text": "b"}', 422, "Validation"),
            (b'{"text": "a", "x": 1}', 422, "Validation"),
            (b'{"text": "a", "order": "input"}', 422, "Validation"),
            (b'{"text": "a", "top_k": 0}', 422, "Validation"),
            (b'{"id": 2, "id": 2, "text": "a"}', 422, "Validation"),
            (b'{"text": "' + b"a" * 1000 + b'"}', 413, "TooLarge"),
            (b"x" * 100_000, 413, "TooLarge"),
            (b"{" + b" " * 100_000, 413, "TooLarge"),
            (b'{"text": "a"}\r{"text": "b"}', 400, "NotJson"),
        ],
    )
    async def test_fail_alone(
        self, checkpoint: Path, bad: bytes, status: int, error_type: str
    ) -> None:
        async with Service(checkpoint, max_document_bytes=500) as service:
            one, failed, other = await post(service, GOOD, bad + b"\n", GOOD)
            assert (failed["status"], failed["error_type"]) == (status, error_type)
            assert (failed["line"], failed["id"]) == (2, 2)
            assert len(failed["error"]) < 200
            assert same(one, other)
            await check_free(service)

    async def test_one_that_is_too_large_is_never_held(self, checkpoint: Path) -> None:
        async with (
            Service(checkpoint, max_document_bytes=100) as service,
            Exchange(service.app, PATH, NDJSON) as exchange,
        ):
            exchange.send(b'{"id": "a", "text": "')
            for _ in range(50):
                exchange.send(b"a" * 1000)
                assert service.gateway.admission.bytes <= 100
            failed = await answer(exchange)
            assert (failed["id"], failed["error_type"]) == ("a", "TooLarge")
            await service.until("gma_bytes_in_flight", 0)
            exchange.send(b'"}\n' + GOOD, last=True)
            assert (await answer(exchange))["line"] == 2

    async def test_a_step_that_fails(self, service: Service) -> None:
        async with Exchange(service.app, PATH, NDJSON) as exchange:
            service.runner.fails = True
            exchange.send(GOOD)
            failed = await answer(exchange)
            assert (failed["status"], failed["error_type"]) == (500, "StepFailed")
            service.runner.fails = False
            exchange.send(GOOD, last=True)
            assert (await answer(exchange))["label"]

    async def test_ours_are_logged_and_tell_nothing(
        self, service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def broken(*_: object, **__: object) -> None:
            raise KeyError("a secret of ours")

        monkeypatch.setattr(Document, "classify", broken)
        (failed,) = await post(service, GOOD)
        assert (failed["status"], failed["error_type"]) == (500, "Internal")
        assert "secret" not in failed["error"]
        assert len([record for record in caplog.records if record.exc_info]) == 1

    async def test_a_deadline_is_each_lines(self, service: Service) -> None:
        service.runner.hold()
        failed, other = await post(service, GOOD, GOOD, **{"x-deadline-ms": "1"})
        assert failed["error_type"] == other["error_type"] == "TooLate"
        service.runner.go.set()
        await check_free(service)


class TestLines:
    @pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
    async def test_are_the_same_however_they_are_cut(self, size: int) -> None:
        text = b"\n\r\n one\ntwo\r\n\n \t\nthree\n\nfour"

        async def pieces() -> AsyncIterator[tuple[bytes, bool]]:
            for start in range(0, len(text), size):
                yield text[start : start + size], start + size >= len(text)

        for skipped in (0, 2, 4):
            lines, found = Lines(pieces()), dict[int, bytes]()
            while await lines.next():
                number = lines.number
                if number != skipped + 1:
                    found[number] = await whole(lines)
            every = {3: b"one", 4: b"two\r", 7: b"three", 9: b"four"}
            assert found == {n: each for n, each in every.items() if n != skipped + 1}

    async def test_of_which_a_part_is_read(self) -> None:
        async def pieces() -> AsyncIterator[tuple[bytes, bool]]:
            for each in (b"on", b"e", b"\ntwo", b""):
                yield each, not each

        lines = Lines(pieces())
        assert await lines.next()
        assert (await anext(lines.pieces())) == (b"on", False)
        assert await lines.next()
        assert lines.number == 2
        assert [each async for each in lines.pieces()] == [(b"two", False), (b"", True)]
        assert not await lines.next()

    async def test_whoever_waits_for_more_may_be_cancelled(self) -> None:
        """As a line is whose deadline passes while it comes."""
        come = asyncio.Event()

        async def pieces() -> AsyncIterator[tuple[bytes, bool]]:
            yield b"on", False
            await come.wait()
            yield b"e\ntwo", True

        lines = Lines(pieces())
        assert await lines.next()
        waiting = asyncio.ensure_future(whole(lines))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        come.set()
        assert await lines.next()
        assert (lines.number, await whole(lines)) == (2, b"two")
        assert not await lines.next()

    async def test_an_error_is_raised_again(self) -> None:
        async def pieces() -> AsyncIterator[tuple[bytes, bool]]:
            yield b"one\ntw", False
            raise ShuttingDown("no more")

        lines = Lines(pieces())
        assert await lines.next()
        assert await whole(lines) == b"one"
        assert await lines.next()
        with pytest.raises(ShuttingDown):
            await whole(lines)
        with pytest.raises(ShuttingDown):
            await lines.next()


class Client:
    """One that sends lines as long as they are taken, and may not read."""

    def __init__(self, body: Iterator[bytes], *, reads: bool = True) -> None:
        self.answers = 0
        self.most_ahead = 0
        """Bytes that were taken, at most, beyond those of lines that were answered."""
        self._sent = 0
        self._body = body
        self._reads = reads
        self._never = asyncio.Event()

    async def receive(self) -> Message:
        body = next(self._body, None)
        if body is None:
            await self._never.wait()
        body = body or b""
        self._sent += len(body)
        self.most_ahead = max(self.most_ahead, self._sent - self.answers * len(GOOD))
        return {"type": "http.request", "body": body, "more_body": bool(body)}

    async def send(self, message: Message) -> None:
        if not self._reads:
            await self._never.wait()
        self.answers += message.get("body", b"").count(b"\n")


class Readers:
    """In place of what reads documents: it counts how many are read, and at once."""

    def __init__(self, answer: Any) -> None:
        self.begun = self.now = self.most = 0
        self._answer = answer

    async def classify(self, pieces: Pieces, **_: object) -> Any:
        self.now, self.begun = self.now + 1, self.begun + 1
        self.most = max(self.most, self.now)
        try:
            async for _piece in pieces:
                for _turn in range(20):
                    await asyncio.sleep(0)
        finally:
            self.now -= 1
        return self._answer


class TestBounds:
    @pytest.fixture
    async def readers(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> Readers:
        readers = Readers(await service.classify("a"))

        async def classify(_: Document, pieces: Pieces, **more: object) -> Any:
            return await readers.classify(pieces, **more)

        monkeypatch.setattr(Document, "classify", classify)
        return readers

    def lines(self, pieces: int | None = None) -> Iterator[bytes]:
        """A body of ten lines a piece, which may have no end."""
        yield from repeat(GOOD * 10) if pieces is None else repeat(GOOD * 10, pieces)
        yield b""

    @pytest.mark.parametrize("order", ["done", "input"])
    async def test_ten_thousand_lines(self, service: Service, readers: Readers, order: str) -> None:
        client = Client(self.lines(1000))
        scope = Exchange(service.app, f"{PATH}?order={order}", NDJSON).scope
        await service.app(scope, client.receive, client.send)
        assert client.answers == readers.begun == 10_000
        assert 1 < readers.most <= TOGETHER
        assert client.most_ahead <= MOST_AHEAD
        assert service.gateway.admission.documents == service.gateway.admission.bytes == 0

    @pytest.mark.parametrize("order", ["done", "input"])
    async def test_a_client_that_does_not_read_is_not_read_either(
        self, service: Service, readers: Readers, order: str
    ) -> None:
        client = Client(self.lines(), reads=False)
        scope = Exchange(service.app, f"{PATH}?order={order}", NDJSON).scope
        batch = asyncio.ensure_future(service.app(scope, client.receive, client.send))
        async with asyncio.timeout(PATIENCE_S):
            while readers.begun < TOGETHER or readers.now:  # noqa: ASYNC110
                await asyncio.sleep(0)
        for _ in range(1000):
            await asyncio.sleep(0)
        assert readers.begun == TOGETHER
        assert client.most_ahead <= MOST_AHEAD
        assert service.gateway.admission.documents == 1  # the batch itself
        assert service.gateway.admission.bytes > 0  # the answers
        batch.cancel()
        await asyncio.wait({batch})
        assert service.gateway.admission.documents == service.gateway.admission.bytes == 0

    async def test_a_line_without_end(self, checkpoint: Path) -> None:
        """It is answered, and what follows of it is dropped as it comes."""
        async with Service(checkpoint, max_document_bytes=1000) as service:
            pieces = chain([b'{"text": "'], repeat(b"a" * 10_000, 2000), [b'"}\n' + GOOD, b""])
            client = Client(pieces)
            scope = Exchange(service.app, PATH, NDJSON).scope
            await service.app(scope, client.receive, client.send)
            assert client.answers == 2
            await check_free(service)


class TestPlaces:
    async def test_one_place_is_enough(self, checkpoint: Path) -> None:
        async with Service(checkpoint, max_documents_in_flight=1) as service:
            assert len(await post(service, *[line(TEXT)] * 5)) == 5
            await check_free(service)

    async def test_others_find_some(self, checkpoint: Path) -> None:
        async with (
            Service(checkpoint, max_documents_in_flight=6, slots=9) as service,
            Exchange(service.app, PATH, NDJSON) as exchange,
            Exchange(service.app, PATH, NDJSON) as another,
        ):
            service.runner.hold()
            exchange.send(GOOD * 20, last=True)
            another.send(GOOD * 20, last=True)
            await service.until("gma_slots_in_use", 5)  # one of each, and half of all
            alone = asyncio.ensure_future(service.classify("a"))
            await service.until("gma_documents_in_flight", 6)
            response = await service.http.post("/v1/documents", content="a", headers=PLAIN)
            assert response.status_code == 429
            service.runner.go.set()
            assert (await alone)["label"]
            for each in (exchange, another):
                assert len([await answer(each) for _ in range(20)]) == 20
                assert await answer(each) is None
            await check_free(service)

    async def test_at_the_door_it_is_a_document_like_any(self, checkpoint: Path) -> None:
        async with Service(checkpoint, max_documents_in_flight=1) as service:
            async with Exchange(service.app, "/v1/documents", PLAIN):
                await service.until("gma_documents_in_flight", 1)
                response = await service.http.post(PATH, content=GOOD, headers=NDJSON)
                assert (response.status_code, response.json()["error_type"]) == (429, "Overloaded")
            await check_free(service)

    async def test_of_one_key(self, checkpoint: Path, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text("\n".join(map(hash_of, ("one", "other"))))
        limits = {"max_documents_in_flight": 8, "max_share_per_key": 0.25, "slots": 8}
        async with Service(checkpoint, api_keys_file=file, **limits) as service:
            one, other = ({"authorization": f"Bearer {key}"} for key in ("one", "other"))
            async with Exchange(service.app, PATH, {**NDJSON, **one}) as exchange:
                service.runner.hold()
                exchange.send(GOOD * 5, last=True)
                await service.until("gma_documents_in_flight", 2)
                headers = {**PLAIN, **one}
                response = await service.http.post("/v1/documents", content="a", headers=headers)
                assert response.status_code == 429
                service.runner.go.set()
                assert len(await post(service, GOOD, GOOD, **other)) == 2
                assert [(await answer(exchange))["line"] for _ in range(5)]

    async def test_a_worker_that_is_full_is_waited_for(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(document, "AGAIN_S", 0.001)
        async with Service(checkpoint, slots=1, max_waiting_documents=0) as service:
            answers = await post(service, *[line(TEXT)] * 8)
            assert all(each.get("label") for each in answers)

    @pytest.mark.parametrize("size", [50, 100])
    async def test_bytes_are_waited_for(self, checkpoint: Path, size: int) -> None:
        limits = {"max_bytes_in_flight": 100, "max_document_bytes": 100}
        async with Service(checkpoint, **limits) as service:
            long = line("a" * (size - len(line("")) + 1))
            assert len(long) == size + 1  # with its end
            async with (
                Exchange(service.app, "/v1/documents", {**PLAIN, "content-length": "60"}) as alone,
                Exchange(service.app, PATH, NDJSON) as exchange,
            ):
                await service.until("gma_bytes_in_flight", 60)
                exchange.send(long[:40])
                await service.until("gma_bytes_in_flight", 100)
                exchange.send(long[40:] + GOOD, last=True)
                alone.send(b"a" * 60, last=True)
                assert (await alone.head())[0] == 200
                found = [await answer(exchange) for _ in range(2)]
                assert all(each["label"] for each in found)
            await check_free(service)

    async def test_and_not_for_ever(self, checkpoint: Path) -> None:
        limits = {"max_bytes_in_flight": 100, "max_document_bytes": 100, "idle_timeout_s": 0.05}
        async with Service(checkpoint, **limits) as service:
            with service.gateway.admission.admit(60):
                failed, other = await post(service, line("a" * 60), GOOD)
                assert (failed["status"], failed["error_type"]) == (429, "Overloaded")
                assert failed["retry_after_s"] >= 1
                assert other["label"]
            await check_free(service)

    async def test_allowances_are_each_lines(self, checkpoint: Path, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text(f"{hash_of('some')} documents_per_minute=2\n{hash_of('other')}\n")
        async with Service(checkpoint, api_keys_file=file) as service:
            service.gateway.admission.spending = Spending(clock=lambda: 0.0)
            some = {"authorization": "Bearer some"}
            *taken, one, two = await post(service, b"{\n", GOOD, GOOD, line(id="a"), **some)
            assert [each.get("status", 200) for each in taken] == [400, 200]
            for refused in (one, two):
                assert (refused["status"], refused["error_type"]) == (429, "AllowanceSpent")
                assert refused["retry_after_s"] == 30
                assert "2 documents_per_minute" in refused["error"]
            assert len(await post(service, GOOD, authorization="Bearer other")) == 1

    async def test_bytes_of_an_allowance(self, checkpoint: Path, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text(f"{hash_of('some')} bytes_per_day={2 * len(GOOD)}\n")
        async with Service(checkpoint, api_keys_file=file) as service:
            service.gateway.admission.spending = Spending(clock=lambda: 0.0)
            answers = await post(service, *[GOOD] * 4, authorization="Bearer some")
            # Without the ends of lines there is some left for a third.
            assert [each.get("status", 200) for each in answers] == [200, 200, 200, 429]


class TestEnds:
    async def check(self, exchange: Exchange, error_type: str) -> None:
        """Check that the batch's last answer is this error."""
        message = await exchange.message()
        failure = json.loads(message["body"])
        TypeAdapter(Failure).validate_python(failure, strict=True)
        assert failure["error_type"] == error_type
        assert failure.keys().isdisjoint({"id", "line"})
        assert not message["more_body"]
        await exchange.finished()

    @pytest.mark.parametrize("begin", [b"", b'{"text": "a'])
    async def test_silence_before_an_answer(self, checkpoint: Path, begin: bytes) -> None:
        async with Service(checkpoint, idle_timeout_s=0.05) as service:
            async with Exchange(service.app, PATH, NDJSON) as exchange:
                exchange.send(begin)
                assert (await exchange.head())[0] == 408
                assert (await exchange.json())["error_type"] == "Stalled"
                await exchange.finished()
            await check_free(service)

    @pytest.mark.parametrize("begin", [b"", b'{"text": "a'])
    async def test_silence_after_one(self, checkpoint: Path, begin: bytes) -> None:
        async with Service(checkpoint, idle_timeout_s=0.05) as service:
            async with Exchange(service.app, PATH, NDJSON) as exchange:
                exchange.send(GOOD + begin)
                assert (await answer(exchange))["line"] == 1
                await self.check(exchange, "Stalled")
            await check_free(service)

    async def test_less_than_the_least_rate(self, checkpoint: Path) -> None:
        async with (
            Service(checkpoint, idle_timeout_s=0.2, min_upload_rate=1000) as service,
            Exchange(service.app, PATH, NDJSON) as exchange,
        ):
            head = asyncio.ensure_future(exchange.head())
            while not head.done():
                exchange.send(b" ")
                await asyncio.wait({head}, timeout=0.01)
            assert (await head)[0] == 408
            await exchange.finished()

    async def test_makes_way_only_while_it_is_waited_for(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(admission, "GRACE_S", 0)
        async with (
            Service(checkpoint, max_documents_in_flight=1) as service,
            Exchange(service.app, PATH, NDJSON) as exchange,
        ):
            service.runner.hold()
            exchange.send(GOOD)
            await service.runner.step_begun()
            response = await service.http.post("/v1/documents", content="a", headers=PLAIN)
            assert response.status_code == 429
            service.runner.go.set()
            assert (await answer(exchange))["line"] == 1
            await service.classify("a")
            await self.check(exchange, "Stalled")

    async def test_draining(self, service: Service) -> None:
        async with Exchange(service.app, PATH, NDJSON) as exchange:
            service.runner.hold()
            exchange.send(GOOD * 2 + b'{"text": "a')
            await service.until("gma_documents_in_flight", 3)
            draining = asyncio.ensure_future(service.gateway.admission.drain())
            service.runner.go.set()
            found = [await answer(exchange) for _ in range(3)]
            assert [each.get("error_type") for each in found].count(None) == 2
            assert {each["line"] for each in found} == {1, 2, 3}
            await self.check(exchange, "ShuttingDown")
            await draining
        response = await service.http.post(PATH, content=GOOD, headers=NDJSON)
        assert response.status_code == 503

    async def test_draining_one_that_has_nothing_to_do(self, service: Service) -> None:
        async with Exchange(service.app, PATH, NDJSON) as exchange:
            exchange.send(GOOD)
            assert (await answer(exchange))["line"] == 1
            await service.gateway.admission.drain()
            await self.check(exchange, "ShuttingDown")

    @pytest.mark.parametrize("begin", [b"", b'{"text": "a', GOOD * 100, GOOD * 100 + b"{"])
    async def test_the_client_leaves(self, service: Service, begin: bytes) -> None:
        async with Exchange(service.app, PATH, NDJSON) as exchange:
            service.runner.hold()
            exchange.send(begin)
            if begin.count(b"\n"):
                await service.runner.step_begun()
            exchange.leave()
            await exchange.finished()
            service.runner.go.set()
        await check_free(service)

    async def test_by_cancellation(self, service: Service) -> None:
        async with Exchange(service.app, PATH, NDJSON) as exchange:
            exchange.send(GOOD * 100)
            assert await answer(exchange)
        await check_free(service)

    async def test_the_log_says_how_many_there_were(
        self, service: Service, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        await post(service, GOOD, b"{\n", GOOD)
        fields = next(vars(each)["fields"] for each in caplog.records if each.msg == "request")
        assert (fields["lines"], fields["failed_lines"], fields["bytes"]) == (3, 1, 2)
        assert "error_type" not in fields
