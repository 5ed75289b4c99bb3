"""A document's answer in events."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from pydantic import TypeAdapter

from gma.service.gateway.contract import ErrorEvent, ProgressEvent, ResultEvent
from gma.service.http import events
from tests.service.answers import NDJSON, PATH, PLAIN, check_evidence, same
from tests.service.asgi import TEXT, Exchange, Service

pytestmark = pytest.mark.anyio


@pytest.fixture
def service(lasting: Service) -> Service:
    return lasting


class TestEvents:
    async def test_come_while_the_body_is_sent(self, service: Service) -> None:
        body = TEXT.encode()
        async with Exchange(service.app, PATH, NDJSON) as exchange:
            exchange.send(body[:200])
            status, headers = await exchange.head()
            assert (status, headers["content-type"]) == (200, "application/x-ndjson")
            progress = await exchange.event()
            TypeAdapter(ProgressEvent).validate_python(progress, strict=True)
            assert 0 < progress["bytes"] <= 200
            exchange.send(body[200:], last=True)
            *_, result = await exchange.events()
            TypeAdapter(ResultEvent).validate_python(result, strict=True)
            assert same(result, await service.classify(TEXT))
            await exchange.finished()

    async def test_progress_is_of_the_bytes_read(self, checkpoint: Path) -> None:
        async with Service(checkpoint, progress_interval_s=1e-9) as service:
            lengths = service.tokenizer.byte_lengths[service.tokenizer.encode(TEXT)]
            response = await service.http.post(PATH, content=TEXT, headers=NDJSON)
        *progress, result = map(json.loads, response.text.splitlines())
        assert progress
        assert result["event"] == "result"
        for event in progress:
            assert event["bytes"] == lengths[: event["tokens"]].sum()

    async def test_come_no_faster_than_asked(self, checkpoint: Path) -> None:
        """The first comes at once, the result too; between them an hour has to pass."""
        async with Service(checkpoint, progress_interval_s=3600) as service:
            response = await service.http.post(
                PATH, content=TEXT, headers=NDJSON, params={"evidence": True}
            )
            answer = json.loads(response.text.splitlines()[-1])
            assert [json.loads(line)["event"] for line in response.text.splitlines()] == [
                "progress",
                "result",
            ]
        check_evidence(answer, len(TEXT.encode()))

    async def test_as_server_sent_events(self, service: Service) -> None:
        headers = {**PLAIN, "accept": "text/event-stream"}
        response = await service.http.post(PATH, content=TEXT, headers=headers)
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.text.endswith("\n\n")
        told = [event.split("\n") for event in response.text.removesuffix("\n\n").split("\n\n")]
        for name, data in told:
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['event']}"
        assert same(event, await service.classify(TEXT))

    @pytest.mark.parametrize(
        ("accept", "given"),
        [
            ([], "application/json"),
            (["*/*"], "application/json"),
            (["application/*"], "application/json"),
            (["text/html", "application/xhtml+xml", "*/*;q=0.8"], "application/json"),
            (["application/x-ndjson;q=0"], "application/json"),
            (["application/x-ndjson;q=0, text/event-stream"], "text/event-stream"),
            (["application/json, application/x-ndjson;q=.1"], "application/json"),
            (["application/json;q=.1, application/x-ndjson;q=.2"], "application/x-ndjson"),
            (["application/json;q=.1", "application/x-ndjson"], "application/x-ndjson"),
            (["text/plain", "application/x-ndjson"], "application/x-ndjson"),
            (["application/x-ndjson, */*;q=.1"], "application/x-ndjson"),
            (["Application/X-NDJSON"], "application/x-ndjson"),
            (["nonsense"], "application/json"),
        ],
    )
    async def test_are_what_the_client_prefers(
        self, service: Service, accept: list[str], given: str
    ) -> None:
        headers = httpx.Headers([("accept", line) for line in accept] + [*PLAIN.items()])
        request = service.http.build_request("POST", PATH, content="a")
        request.headers = httpx.Headers([*headers.raw, (b"content-length", b"1")])
        response = await service.http.send(request)
        assert (response.status_code, response.headers["content-type"]) == (200, given)

    async def test_an_error_before_the_first_is_a_status(self, service: Service) -> None:
        response = await service.http.post(PATH, content=b"", headers=NDJSON)
        assert response.status_code == 400
        assert response.headers["content-type"] == "application/json"

    async def test_an_error_after_the_first_is_an_event(self, service: Service) -> None:
        async with Exchange(service.app, PATH, NDJSON) as exchange:
            exchange.send(TEXT.encode()[:200])
            await exchange.head()
            exchange.send(b"\xff\xff", last=True)
            *_, error = await exchange.events()
            TypeAdapter(ErrorEvent).validate_python(error, strict=True)
            assert error["error_type"] == "NotUtf8"
            assert "byte 200" in error["error"]
            await exchange.finished()
        assert await service.metric("gma_documents_in_flight") == 0


class TestHeartbeats:
    """Of server-sent events: comments, which their clients skip."""

    HEADERS = PLAIN | {"accept": "text/event-stream"}

    @pytest.fixture(autouse=True)
    def _soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(events, "HEARTBEAT_S", 0.001)

    async def last(self, exchange: Exchange) -> str:
        """The last event, after the heartbeats and all others."""
        while (message := await exchange.message())["more_body"]:
            pass
        event: str = message["body"].decode()
        return event

    async def test_come_while_nothing_else_does(self, service: Service) -> None:
        async with Exchange(service.app, PATH, self.HEADERS) as exchange:
            status, headers = await exchange.head()
            assert (status, headers["content-type"]) == (200, "text/event-stream")
            for _ in range(3):
                assert (await exchange.message())["body"] == b":\n\n"
            exchange.send(TEXT.encode(), last=True)
            assert (await self.last(exchange)).startswith("event: result\n")
            await exchange.finished()
            assert not exchange.answered

    async def test_an_error_after_the_first_is_an_event(self, service: Service) -> None:
        async with Exchange(service.app, PATH, self.HEADERS) as exchange:
            assert (await exchange.head())[0] == 200
            exchange.send(b"\xff", last=True)
            event = await self.last(exchange)
        assert event.startswith("event: error\n")
        assert "NotUtf8" in event

    async def test_are_not_of_json_lines(self, service: Service) -> None:
        service.runner.go.clear()
        async with Exchange(service.app, PATH, NDJSON) as exchange:
            exchange.send(TEXT.encode(), last=True)
            await service.runner.step_begun()
            await service.metric("gma_documents_in_flight")  # other things go on
            assert not exchange.answered
            service.runner.go.set()
            assert (await exchange.head())[0] == 200
            assert (await exchange.events())[-1]["event"] == "result"
