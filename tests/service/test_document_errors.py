"""What a document's client gets in place of an answer."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from gma.service.errors import NotReady, TooLate
from gma.service.gateway import admission
from gma.service.gateway.document import Document
from gma.service.http import body, events
from gma.service.http.keys import hash_of
from tests.service.answers import JSON, NDJSON, PATH, PLAIN
from tests.service.asgi import LABELS, PATIENCE_S, TEXT, Exchange, Service

pytestmark = pytest.mark.anyio


@pytest.fixture
def service(lasting: Service) -> Service:
    return lasting


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
            (JSON, "", b'{"text": "a", "text": "b"}', 422, "Validation"),
            (JSON, "", rb'{"text": "a", "\u0074ext": "b"}', 422, "Validation"),
            (JSON, "", b'{"text": "a", "top_k": 1, "top_k": 1}', 422, "Validation"),
            (JSON, "", b'{"text": "a", "top_k": 1.5}', 422, "Validation"),
            (JSON, "", b'{"text": "a", "top_k": true}', 422, "Validation"),
            (JSON, "", b'{"text": "a", "evidence": 1}', 422, "Validation"),
            (JSON, "", b'{"text": "a", "top_k": ' + b"1" * 5000 + b"}", 422, "Validation"),
            (JSON, "", b'{"text": "a", "top_k": 1e400}', 422, "Validation"),
            (JSON, "", b'{"text": "a", "max_tokens": -1e400}', 422, "Validation"),
            (JSON, "", b'{"text": "a", "evidence": 1e400}', 422, "Validation"),
            (JSON, "", b'{"text": 1e400}', 422, "Validation"),
            (JSON, "", b'{"text": "a", "x": 1e400}', 422, "Validation"),
            (JSON, "", b'{"text": "a", "top_k": 1e}', 400, "NotJson"),
            (JSON, "", b'{"text": "a", "top_k": 1.}', 400, "NotJson"),
            (JSON, "", b'{"text": "a", "top_k": 1-1}', 400, "NotJson"),
            (JSON, "", b'{"text": {"a": 1}}', 422, "Validation"),
            (JSON, "", b'{"text": null}', 422, "Validation"),
            (JSON, "", b'"text"', 422, "Validation"),
            (JSON, "", b"\xef\xbb\xbf", 400, "NotJson"),
            (JSON, "", b'{"text": "a"} x', 400, "NotJson"),
            (JSON, "", b'{"text": "a",}', 400, "NotJson"),
            (JSON, "", b'{"text": "a" "top_k": 1}', 400, "NotJson"),
            (JSON, "", b'{"text": "a", "top_k": 01}', 400, "NotJson"),
            (JSON, "", b'{"text": "a", "top_k": NaN}', 400, "NotJson"),
            (JSON, "", b'{"text": "a\nb"}', 400, "NotJson"),
            (JSON, "", b'{"text": "a', 400, "NotJson"),
            (JSON, "", b'{"text', 400, "NotJson"),
            (JSON, "", rb'{"te\xt": "a"}', 400, "NotJson"),
            (JSON, "", rb'{"text": "\x"}', 400, "NotJson"),
            (JSON, "", rb'{"text": "\ud83d\u0041"}', 400, "NotJson"),
            (JSON, "", b'{"text": "\\n\xff"}', 400, "NotUtf8"),
            (PLAIN, "?top_k=1&top_k=1", b"a", 422, "Validation"),
            (PLAIN, "?topk=1", b"a", 422, "Validation"),
            (PLAIN, "?top_k=0", b"a", 422, "Validation"),
            (PLAIN, "?top_k=x", b"a", 422, "Validation"),
            *(
                (PLAIN, f"?top_k={each}", b"a", 422, "Validation")
                for each in ("1_0", "%2010", "10%20", "%2B10", "010", "1.0", "%D9%A1", "")
            ),
            (PLAIN, "?max_tokens=1_0", b"a", 422, "Validation"),
            (PLAIN, "?max_tokens=0", b"a", 422, "Validation"),
            (PLAIN, "?top_k=2147483648", b"a", 422, "Validation"),
            (PLAIN, "?evidence=perhaps", b"a", 422, "Validation"),
            ({}, "", b"a", 415, "UnsupportedContent"),
            ({"content-type": "text/css"}, "", b"a", 415, "UnsupportedContent"),
            (
                {"content-type": "application/x-www-form-urlencoded"},
                "",
                b"a",
                415,
                "UnsupportedContent",
            ),
            ({"content-type": "text/plain; charset=utf-7"}, "", b"a", 415, "UnsupportedContent"),
            (
                {"content-type": "text/plain; charset=utf-8; charset=latin-1"},
                "",
                b"a",
                415,
                "UnsupportedContent",
            ),
            ({**PLAIN, "content-encoding": "br"}, "", b"a", 415, "UnsupportedContent"),
            ({**PLAIN, "content-length": "9" * 5001}, "", b"a", 413, "TooLarge"),
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
            (
                JSON,
                "",
                b'{"text": ["secret"]}',
                "text: input should be neither a list nor an object",
            ),
            (JSON, "", b'{"text": 1}', "text: input should be a valid string"),
            (JSON, "", b'{"text": "a", "top_k": "1"}', "top_k: .* valid integer, not '1'"),
            (JSON, "", b'{"text": "a", "top_k": 2, "top_k": 3}', "top_k is given twice"),
            (JSON, "", b'{"text": "a",, "top_k": 2}', "the body is not JSON, from byte 13 on"),
            (JSON, "", b"[]", "input should be an object"),
            (
                JSON,
                "",
                b'{"text": "a", "a":1,"b":1,"c":1,"d":1,"e":1,"f":1}',
                "a is unknown",
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

    @pytest.mark.parametrize(
        ("headers", "path", "body"),
        [
            (JSON, PATH, b'{"' + 2_000_000 * b"k" + b'": 1}'),
            (JSON, PATH, b'{"text": "a", "top_k": "' + 2_000_000 * b"k" + b'"}'),
            (JSON, PATH, b'{"text": "a", "top_k": ' + 2_000_000 * b"1" + b"}"),
            (JSON, PATH, b'{"a": 1, ' + b",".join(b'"k%d": 1' % n for n in range(100_000)) + b"}"),
            (PLAIN, f"{PATH}?{5000 * 'k'}=1", b"a"),
            (PLAIN, f"{PATH}?top_k={5000 * '1'}", b"a"),
            (PLAIN, f"{PATH}?" + "&".join(f"{n:>60}=1" for n in range(100)), b"a"),
            (PLAIN, "/" + 5000 * "k", b"a"),
            ({"content-type": 5000 * "k"}, PATH, b"a"),
            ({"content-type": "text/plain; charset=" + 5000 * "k"}, PATH, b"a"),
            ({**PLAIN, "content-encoding": 5000 * "k"}, PATH, b"a"),
        ],
    )
    async def test_repeat_little_of_what_was_sent(
        self, service: Service, headers: dict[str, str], path: str, body: bytes
    ) -> None:
        response = await service.http.post(path, content=body, headers=headers)
        assert response.status_code in (404, 415, 422)
        assert len(response.content) < 600

    async def test_a_coding_in_a_second_line(self, service: Service) -> None:
        lines = [("content-type", "text/plain"), *(("content-encoding", x) for x in ("", "br"))]
        response = await service.http.post(PATH, content=b"a", headers=lines)
        assert (response.status_code, response.json()["error_type"]) == (415, "UnsupportedContent")

    async def test_too_large_by_its_length_before_any_of_it(self, checkpoint: Path) -> None:
        async with Service(checkpoint, max_document_bytes=100) as service:
            headers = {**PLAIN, "content-length": "101"}
            async with Exchange(service.app, PATH, headers) as exchange:
                assert (await exchange.head())[0] == 413
                error = await exchange.json()
                assert error["error_type"] == "TooLarge"
                assert "100 bytes" in error["error"]
                await exchange.finished()

    @pytest.mark.parametrize(("headers", "begin"), [(PLAIN, b""), (JSON, b'{"text": "')])
    async def test_too_large_as_soon_as_it_is_counted(
        self, checkpoint: Path, headers: dict[str, str], begin: bytes
    ) -> None:
        async with Service(checkpoint, max_document_bytes=100) as service:
            async with Exchange(service.app, PATH, headers) as exchange:
                exchange.send(begin + b"a" * (100 - len(begin)))
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

    @pytest.mark.parametrize("rate", [0, 1])
    async def test_silence(self, checkpoint: Path, rate: int) -> None:
        async with Service(checkpoint, idle_timeout_s=0.05, min_upload_rate=rate) as service:
            async with Exchange(service.app, PATH, PLAIN) as exchange:
                exchange.send(b"a" * 50)
                assert (await exchange.head())[0] == 408
                assert (await exchange.json())["error_type"] == "Stalled"
                await exchange.finished()
            assert await service.metric("gma_documents_in_flight") == 0

    async def test_less_than_the_least_rate(self, checkpoint: Path) -> None:
        async with (
            Service(checkpoint, idle_timeout_s=0.2, min_upload_rate=1000) as service,
            Exchange(service.app, PATH, PLAIN) as exchange,
        ):
            head = asyncio.ensure_future(exchange.head())
            while not head.done():
                exchange.send(b"a")
                await asyncio.wait({head}, timeout=0.01)
            assert (await head)[0] == 408
            await exchange.finished()

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


class TestDeadline:
    async def test_that_passes(self, service: Service) -> None:
        service.runner.go.clear()
        headers = {**PLAIN, "x-deadline-ms": "1"}
        response = await service.http.post(PATH, content=TEXT, headers=headers)
        assert (response.status_code, response.json()["error_type"]) == (504, "TooLate")
        service.runner.go.set()
        await service.until("gma_slots_in_use", 0)
        await service.until("gma_documents_in_flight", 0)

    async def test_that_passes_after_the_answer_has_begun(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(events, "HEARTBEAT_S", 0.001)
        headers = {**PLAIN, "accept": "text/event-stream", "x-deadline-ms": "500"}
        async with Exchange(service.app, PATH, headers) as exchange:
            assert (await exchange.head())[0] == 200
            while (message := await exchange.message())["more_body"]:
                pass
        assert message["body"].startswith(b"event: error\n")
        assert b'"TooLate"' in message["body"]

    async def test_that_is_met(self, service: Service) -> None:
        headers = {**PLAIN, "x-deadline-ms": str(1000 * PATIENCE_S)}
        response = await service.http.post(PATH, content=TEXT, headers=headers)
        assert response.status_code == 200

    @pytest.mark.parametrize("given", ["0", "-1", "1.5", "soon", "", str(2**31)])
    async def test_that_is_none(self, service: Service, given: str) -> None:
        headers = {**PLAIN, "x-deadline-ms": given}
        response = await service.http.post(PATH, content=TEXT, headers=headers)
        assert (response.status_code, response.json()["error_type"]) == (422, "Validation")
        assert "x-deadline-ms" in response.json()["error"]

    async def test_that_is_given_twice(self, service: Service) -> None:
        headers = [*PLAIN.items(), ("x-deadline-ms", "1"), ("x-deadline-ms", "100000")]
        response = await service.http.post(PATH, content=TEXT, headers=headers)
        assert (response.status_code, response.json()["error_type"]) == (422, "Validation")
        assert "x-deadline-ms is given twice" in response.json()["error"]

    async def test_that_is_too_soon_for_so_many_bytes(self, checkpoint: Path) -> None:
        """10 s for what was read at a speed at which it takes 20, if its tokens are long."""
        async with Service(checkpoint) as service:
            service.gateway.admission.read(2**17, 20)
            headers = {**PLAIN, "x-deadline-ms": "10000", "content-length": str(2**20)}
            async with Exchange(service.app, PATH, headers) as exchange:
                assert (await exchange.head())[0] == 504  # with no byte of the body
                assert (await exchange.json())["error_type"] == "TooLate"
            for sent, path in (
                (headers | {"content-length": str(2**18)}, PATH),
                (headers, f"{PATH}?max_tokens=1"),
                (headers | {"content-type": "application/json"}, PATH),
                (headers | {"x-deadline-ms": "30000"}, PATH),
            ):
                async with Exchange(service.app, path, sent) as exchange:
                    await service.until("gma_documents_in_flight", 1)
                    exchange.leave()
                    await exchange.finished()

    async def test_is_by_what_was_read_fastest(self, checkpoint: Path) -> None:
        async with Service(checkpoint) as service:
            door = service.gateway.admission
            with door.admit(2**20, deadline_s=0.001):  # nothing is known yet
                pass
            door.read(1, 100)  # nor by this
            door.read(2**17, 20)
            door.read(2**17, 2)
            door.read(2**17, 20)
            with door.admit(2**20, deadline_s=3):
                pass
            with pytest.raises(TooLate), door.admit(2**20, deadline_s=1):
                pass


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

    async def test_of_one_key(self, checkpoint: Path, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text("\n".join(map(hash_of, ("one", "other"))))
        limits = {"max_documents_in_flight": 4, "max_share_per_key": 0.5}
        async with Service(checkpoint, api_keys_file=file, **limits) as service:
            one, other = ({**PLAIN, "authorization": f"Bearer {key}"} for key in ("one", "other"))
            async with (
                Exchange(service.app, PATH, one) as first,
                Exchange(service.app, PATH, one),
            ):
                await service.until("gma_documents_in_flight", 2)
                await self.check(await service.http.post(PATH, content="a", headers=one))
                response = await service.http.post(PATH, content="a", headers=other)
                assert response.status_code == 200
                first.send(b"a", last=True)
                assert (await first.head())[0] == 200
                await first.finished()
                response = await service.http.post(PATH, content="a", headers=one)
                assert response.status_code == 200

    async def test_bytes_of_one_address(self, checkpoint: Path) -> None:
        limits = {"max_bytes_in_flight": 100, "max_document_bytes": 100}
        async with Service(checkpoint, max_share_per_address=0.5, **limits) as service:
            # That which is alone may be as large as any.
            assert (await service.classify("a" * 100))["usage"]["bytes"] == 100
            headers = {**PLAIN, "content-length": "40"}
            async with Exchange(service.app, PATH, headers) as exchange:
                await service.until("gma_bytes_in_flight", 40)
                await self.check(await service.http.post(PATH, content="a" * 11, headers=PLAIN))
                await service.classify("a" * 10)
                exchange.send(b"a" * 40, last=True)
                assert (await exchange.head())[0] == 200

    async def test_slow_uploads(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of too many that come slowly the one that has sent least is given up."""
        monkeypatch.setattr(body, "LOOK_S", 0.02)
        async with (
            Service(checkpoint, max_slow_uploads=1) as service,
            Exchange(service.app, PATH, PLAIN) as more,
            Exchange(service.app, PATH, PLAIN) as less,
        ):
            more.send(b"aa")
            less.send(b"a")
            assert (await less.head())[0] == 408
            assert not more.answered
            more.send(b"", last=True)
            assert (await more.head())[0] == 200

    async def test_a_slow_upload_makes_way(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with (
            Service(checkpoint, max_documents_in_flight=1) as service,
            Exchange(service.app, PATH, PLAIN) as exchange,
        ):
            exchange.send(b"a")
            await service.until("gma_documents_in_flight", 1)
            await self.check(await service.http.post(PATH, content="a", headers=PLAIN))
            monkeypatch.setattr(admission, "GRACE_S", 0)
            await service.classify("a")
            assert (await exchange.head())[0] == 408

    async def test_a_slow_upload_is_no_document_of_a_worker(self, checkpoint: Path) -> None:
        async with (
            Service(checkpoint, slots=1, max_waiting_documents=0) as service,
            Exchange(service.app, PATH, PLAIN) as exchange,
        ):
            exchange.send(b"a" * 7)  # and a chunk has eight tokens
            await service.until("gma_documents_in_flight", 1)
            await service.classify("a")
            exchange.send(b"", last=True)
            assert (await exchange.head())[0] == 200

    @pytest.mark.parametrize("headers", [PLAIN, NDJSON])
    async def test_who_does_not_read_holds_no_place(
        self, checkpoint: Path, headers: dict[str, str]
    ) -> None:
        limits = {"max_documents_in_flight": 1, "progress_interval_s": 1e-9}
        async with Service(checkpoint, **limits) as service:
            async with Exchange(service.app, PATH, headers, reads=False) as exchange:
                exchange.send(TEXT.encode(), last=True)
                await service.runner.step_begun()
                await service.until("gma_documents_in_flight", 0)
                assert await service.metric("gma_bytes_in_flight") > 0  # the answer's
                await service.classify("a")
            assert await service.metric("gma_bytes_in_flight") == 0

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
