"""What a document's client gets in place of an answer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gma.service.errors import NotReady
from gma.service.gateway.document import Document
from tests.service.answers import JSON, NDJSON, PATH, PLAIN
from tests.service.asgi import LABELS, TEXT, Exchange, Service

pytestmark = pytest.mark.anyio


class TestErrors:
    @pytest.mark.parametrize(
        ("headers", "path", "body", "status", "error_type"),
        [
            (PLAIN, "", b"", 400, "Empty"),
            (PLAIN, "", b"abc\xff", 400, "NotUtf8"),
            (PLAIN, "", "é".encode()[:1], 400, "NotUtf8"),
            (JSON, "", b"{", 400, "NotJson"),
            (JSON, "", b"", 400, "NotJson"),
            (JSON, "", b'{"text": "\xff"}', 400, "NotUtf8"),
            (JSON, "", rb'{"text": "\ud800"}', 400, "NotJson"),
            (JSON, "", b'{"text": ""}', 400, "Empty"),
            (JSON, "", b"[]", 422, "Validation"),
            (JSON, "", b"{}", 422, "Validation"),
            (JSON, "", b'{"text": 1}', 422, "Validation"),
            (JSON, "", b'{"text": "a", "x": 1}', 422, "Validation"),
            (
                JSON,
                "",
                b'{"text": "a", "top_k": "1"}',
                422,
                "Validation",
            ),
            (
                JSON,
                "",
                b'{"text": "a", "top_k": 0}',
                422,
                "Validation",
            ),
            (JSON, "?top_k=1", b'{"text": "a"}', 422, "Validation"),
            (PLAIN, "?topk=1", b"a", 422, "Validation"),
            (PLAIN, "?top_k=0", b"a", 422, "Validation"),
            (PLAIN, "?top_k=x", b"a", 422, "Validation"),
            (PLAIN, "?max_tokens=0", b"a", 422, "Validation"),
            (PLAIN, "?evidence=perhaps", b"a", 422, "Validation"),
            ({}, "", b"a", 415, "UnsupportedContent"),
            ({"content-type": "text/html"}, "", b"a", 415, "UnsupportedContent"),
            (
                {"content-type": "application/x-www-form-urlencoded"},
                "",
                b"a",
                415,
                "UnsupportedContent",
            ),
            ({"content-type": "text/plain; charset=latin-1"}, "", b"a", 415, "UnsupportedContent"),
            ({**PLAIN, "content-encoding": "gzip"}, "", b"a", 415, "UnsupportedContent"),
        ],
    )
    async def test_of_the_client(
        self,
        service: Service,
        headers: dict[str, str],
        path: str,
        body: bytes,
        status: int,
        error_type: str,
    ) -> None:
        response = await service.http.post(PATH + path, content=body, headers=headers)
        assert (response.status_code, response.json()["error_type"]) == (status, error_type)
        assert response.json().keys() == {"error", "error_type"}
        assert len(response.headers["x-request-id"]) == 32
        assert await service.metric("gma_documents_in_flight") == 0

    @pytest.mark.parametrize(
        ("headers", "query", "body", "message"),
        [
            (PLAIN, "?topk=1", b"a", r"query\.topk is unknown"),
            (
                PLAIN,
                "?top_k=x",
                b"a",
                r"query\.top_k: input should be a valid integer, .*, not 'x'",
            ),
            (JSON, "", b'{"text": "a", "topk": 1}', "topk is unknown"),
            (JSON, "", b"{}", "text is missing"),
            (JSON, "", b'{"text": ["secret"]}', "text: input should be a valid string"),
            (JSON, "", b"[]", "input should be an object"),
            (
                JSON,
                "",
                b'{"text": "a", "a":1,"b":1,"c":1,"d":1,"e":1,"f":1}',
                "(. is unknown(; )?){5}",
            ),
            (PLAIN, "", b"ab\xff", "the text is not UTF-8 at byte 2: .*"),
            ({}, "", b"a", ".*Content-Type: text/plain.*"),
        ],
    )
    async def test_name_what_is_wrong(
        self, service: Service, headers: dict[str, str], query: str, body: bytes, message: str
    ) -> None:
        response = await service.http.post(PATH + query, content=body, headers=headers)
        assert re.fullmatch(message, response.json()["error"]), response.text

    async def test_too_large_by_its_length_before_any_of_it(self, checkpoint: Path) -> None:
        async with Service(checkpoint, max_document_bytes=100) as service:
            headers = {**PLAIN, "content-length": "101"}
            async with Exchange(service.app, PATH, headers) as exchange:
                assert (await exchange.head())[0] == 413
                error = await exchange.json()
                assert error["error_type"] == "TooLarge"
                assert "100 bytes" in error["error"]
                await exchange.finished()

    @pytest.mark.parametrize("content_type", ["text/plain", "application/json"])
    async def test_too_large_as_soon_as_it_is_counted(
        self, checkpoint: Path, content_type: str
    ) -> None:
        async with Service(checkpoint, max_document_bytes=100) as service:
            async with Exchange(service.app, PATH, {"content-type": content_type}) as exchange:
                exchange.send(b"a" * 100)
                exchange.send(b"a")
                assert (await exchange.head())[0] == 413
                await exchange.finished()
            assert await service.metric("gma_bytes_in_flight") == 0
            assert (await service.classify("a" * 100))["usage"]["bytes"] == 100

    async def test_too_large_while_the_model_is_behind(self, checkpoint: Path) -> None:
        """Counting does not wait for reading."""
        async with Service(checkpoint, max_document_bytes=4000, inbox_tokens=8) as service:
            service.runner.go.clear()
            async with Exchange(service.app, PATH, PLAIN) as exchange:
                exchange.send(b"a tale. " * 499)
                await service.runner.step_begun()
                exchange.send(b"a tale. " * 2)
                assert (await exchange.head())[0] == 413
                service.runner.go.set()
                await exchange.finished()

    async def test_silence(self, checkpoint: Path) -> None:
        async with Service(checkpoint, idle_timeout_s=0.05) as service:
            async with Exchange(service.app, PATH, PLAIN) as exchange:
                exchange.send(b"a" * 50)
                assert (await exchange.head())[0] == 408
                assert (await exchange.json())["error_type"] == "Stalled"
                await exchange.finished()
            assert await service.metric("gma_documents_in_flight") == 0

    async def test_a_failing_step_fails_its_document_only(self, service: Service) -> None:
        service.runner.fails = True
        response = await service.http.post(PATH, content=TEXT, headers=PLAIN)
        assert (response.status_code, response.json()["error_type"]) == (500, "StepFailed")
        assert "fire" not in response.text
        service.runner.fails = False
        assert (await service.classify(TEXT))["label"] in LABELS

    async def test_a_failing_step_in_mid_upload(self, service: Service) -> None:
        async with Exchange(service.app, PATH, NDJSON) as exchange:
            exchange.send(TEXT.encode()[:200])
            await exchange.head()
            service.runner.fails = True
            exchange.send(TEXT.encode()[200:])
            *_, error = await exchange.events()
            assert error["error_type"] == "StepFailed"
            await exchange.finished()

    async def test_ours_are_logged_and_tell_nothing(
        self, service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def broken(*_: object, **__: object) -> None:
            raise KeyError("a secret of ours")

        monkeypatch.setattr(Document, "classify", broken)
        response = await service.http.post(PATH, content=TEXT, headers=PLAIN)
        assert response.status_code == 500
        assert response.json()["error_type"] == "Internal"
        assert "secret" not in response.text
        (record,) = [record for record in caplog.records if record.exc_info]
        assert vars(record)["fields"]["id"] == response.headers["x-request-id"]

    async def test_without_a_worker(self, checkpoint: Path) -> None:
        service = Service(checkpoint)
        response = await service.http.post(PATH, content=TEXT, headers=PLAIN)
        assert (response.status_code, response.json()["error_type"]) == (503, "NotReady")
        assert int(response.headers["retry-after"]) > 0
        with pytest.raises(NotReady):
            await service.worker.info()


class TestOverload:
    async def check(self, response: Any) -> None:
        assert (response.status_code, response.json()["error_type"]) == (429, "Overloaded")
        assert int(response.headers["retry-after"]) > 0

    async def test_documents_in_flight(self, checkpoint: Path) -> None:
        async with Service(checkpoint, max_documents_in_flight=1) as service:
            async with Exchange(service.app, PATH, PLAIN) as exchange:
                exchange.send(TEXT.encode())
                await service.runner.step_begun()
                await self.check(await service.http.post(PATH, content="a", headers=PLAIN))
                exchange.send(b"", last=True)
                assert (await exchange.head())[0] == 200
                await exchange.finished()
            await service.classify("a")

    async def test_bytes_in_flight_by_length(self, checkpoint: Path) -> None:
        limits = {"max_bytes_in_flight": 100, "max_document_bytes": 100}
        async with Service(checkpoint, **limits) as service:
            headers = {**PLAIN, "content-length": "60"}
            async with Exchange(service.app, PATH, headers) as exchange:
                await service.until("gma_bytes_in_flight", 60)
                await self.check(await service.http.post(PATH, content="a" * 41, headers=PLAIN))
                await service.classify("a" * 40)
                exchange.send(b"a" * 60, last=True)
                assert (await exchange.head())[0] == 200
                await exchange.finished()
            await service.classify("a" * 100)

    async def test_bytes_in_flight_as_they_come(self, checkpoint: Path) -> None:
        limits = {"max_bytes_in_flight": 100, "max_document_bytes": 100}
        async with (
            Service(checkpoint, **limits) as service,
            Exchange(service.app, PATH, PLAIN) as exchange,
            Exchange(service.app, PATH, PLAIN) as other,
        ):
            exchange.send(b"a" * 60)
            await service.runner.step_begun()
            other.send(b"a" * 40)
            other.send(b"a")
            assert (await other.head())[0] == 429
            exchange.send(b"", last=True)
            assert (await exchange.head())[0] == 200

    async def test_of_the_worker(self, checkpoint: Path) -> None:
        async with Service(checkpoint, slots=1, max_waiting_documents=0) as service:
            async with Exchange(service.app, PATH, PLAIN) as exchange:
                exchange.send(TEXT.encode())
                await service.runner.step_begun()
                await self.check(await service.http.post(PATH, content=TEXT, headers=PLAIN))
                exchange.send(b"", last=True)
                assert (await exchange.head())[0] == 200
                await exchange.finished()
            await service.classify("a")
