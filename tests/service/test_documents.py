"""POST /v1/documents, through ASGI, with a real engine and a tiny model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from gma.service.errors import NotReady
from gma.service.gateway.contract import Answer, ErrorEvent, ProgressEvent, ResultEvent
from tests.service.asgi import LABELS, TEXT, Exchange, Service

pytestmark = pytest.mark.anyio

PLAIN = {"content-type": "text/plain"}
NDJSON = {**PLAIN, "accept": "application/x-ndjson"}
PATH = "/v1/documents"


def logits(answer: dict[str, Any]) -> dict[str, float]:
    return {score["label"]: score["logit"] for score in answer["scores"]}


def same(answer: dict[str, Any], other: dict[str, Any]) -> bool:
    return (
        answer["label"] == other["label"]
        and answer["usage"] == other["usage"]
        and logits(answer) == pytest.approx(logits(other), rel=1e-5, abs=1e-5)
    )


class TestAnswer:
    async def test_has_the_shape_of_the_contract(self, service: Service) -> None:
        response = await service.http.post(PATH, content=TEXT, headers=PLAIN)
        answer = response.json()
        TypeAdapter(Answer).validate_python(answer, strict=True)
        assert response.status_code == 200
        assert answer["model"] == "tiny"
        assert answer["label"] == answer["scores"][0]["label"]
        scores = [score["score"] for score in answer["scores"]]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1)
        assert {score["label"] for score in answer["scores"]} == set(LABELS)
        tokens = len(service.tokenizer.encode(TEXT))
        chunks = -(-tokens // service.settings.chunk_tokens)
        assert answer["usage"] == {"bytes": len(TEXT.encode()), "tokens": tokens, "chunks": chunks}
        assert "evidence" not in answer
        assert "truncated" not in answer

    async def test_carries_its_timing_in_headers_too(self, service: Service) -> None:
        response = await service.http.post(PATH, content=TEXT, headers=PLAIN)
        timing = response.json()["timing_ms"]
        assert {
            "queue": float(response.headers["x-queue-time"]),
            "tokenize": float(response.headers["x-tokenization-time"]),
            "compute": float(response.headers["x-inference-time"]),
            "total": float(response.headers["x-total-time"]),
        } == timing
        assert timing["total"] > 0

    async def test_scores_are_the_softmax_of_the_logits(self, service: Service) -> None:
        answer = await service.classify(TEXT)
        weights = np.exp(list(logits(answer).values()))
        assert [s["score"] for s in answer["scores"]] == pytest.approx(weights / weights.sum())

    async def test_top_k(self, service: Service) -> None:
        whole, best = await service.classify(TEXT), await service.classify(TEXT, top_k=2)
        assert logits(best) == pytest.approx(dict(list(logits(whole).items())[:2]))
        assert len((await service.classify(TEXT, top_k=99))["scores"]) == len(LABELS)

    async def test_json_is_answered_like_text(self, service: Service) -> None:
        body = {"text": TEXT, "top_k": 2, "evidence": True}
        answer = (await service.http.post(PATH, json=body)).json()
        assert same(answer, await service.classify(TEXT, top_k=2))
        assert answer["evidence"]

    @pytest.mark.parametrize(
        "content_type",
        ["text/plain; charset=utf-8", 'TEXT/PLAIN;charset="UTF-8"', "text/plain; charset=us-ascii"],
    )
    async def test_takes_every_way_to_say_utf8_text(
        self, service: Service, content_type: str
    ) -> None:
        headers = {"content-type": content_type}
        assert (await service.http.post(PATH, content=TEXT, headers=headers)).status_code == 200

    @pytest.mark.parametrize("text", ["a", " ", "\n", "é", "🚢", "\x00", "\ufeff"])
    async def test_takes_the_shortest_texts(self, service: Service, text: str) -> None:
        assert (await service.classify(text))["usage"]["bytes"] == len(text.encode())


class TestPieces:
    @pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
    async def test_cuts_change_nothing(self, service: Service, size: int) -> None:
        """Also inside characters: the text has some of one to four bytes."""
        body = TEXT.encode()

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(body), size):
                yield body[start : start + size]

        response = await service.http.post(PATH, content=pieces(), headers=PLAIN)
        assert same(response.json(), await service.classify(TEXT))

    async def test_is_read_while_it_arrives(self, service: Service) -> None:
        body = TEXT.encode()
        async with Exchange(service.app, PATH, PLAIN) as exchange:
            exchange.send(body[:200])
            await service.runner.step_begun()
            assert not exchange.answered
            exchange.send(body[200:], last=True)
            assert (await exchange.head())[0] == 200
            assert same(await exchange.json(), await service.classify(TEXT))

    async def test_empty_messages_are_not_the_end(self, service: Service) -> None:
        async with Exchange(service.app, PATH, PLAIN) as exchange:
            for piece in (b"", b"some ", b"", b"text", b""):
                exchange.send(piece)
            exchange.send(b"", last=True)
            await exchange.head()
            assert same(await exchange.json(), await service.classify("some text"))


class TestMaxTokens:
    async def test_cuts_and_says_so(self, service: Service) -> None:
        answer = await service.classify(TEXT, max_tokens=10)
        assert answer["truncated"] is True
        assert answer["usage"]["tokens"] == 10
        size = int(service.tokenizer.byte_lengths[service.tokenizer.encode(TEXT)[:10]].sum())
        assert answer["usage"]["bytes"] == size

    @pytest.mark.parametrize("spare", [0, 1])
    async def test_says_nothing_if_nothing_was_cut(self, service: Service, spare: int) -> None:
        tokens = len(service.tokenizer.encode(TEXT))
        answer = await service.classify(TEXT, max_tokens=tokens + spare)
        assert "truncated" not in answer
        assert answer["usage"]["tokens"] == tokens

    @pytest.mark.parametrize("first", [10, 200])
    async def test_answers_without_the_rest_of_the_upload(
        self, service: Service, first: int
    ) -> None:
        async with Exchange(service.app, PATH + "?max_tokens=10", PLAIN) as exchange:
            exchange.send(TEXT.encode()[:first])
            exchange.send(TEXT.encode()[first:])
            await exchange.head()
            answer = await exchange.json()
            assert answer["truncated"]
            assert answer["usage"]["tokens"] == 10
            await exchange.finished()

    async def test_the_end_is_known_only_at_the_end(self, service: Service) -> None:
        """All tokens allowed have come, and then nothing: nothing was cut."""
        body = b"one two three four five six seven eight nine ten " * 4
        tokens = len(service.tokenizer.encode(body))
        async with Exchange(service.app, f"{PATH}?max_tokens={tokens}", PLAIN) as exchange:
            exchange.send(body)
            await service.runner.step_begun()
            exchange.send(b"", last=True)
            await exchange.head()
            assert "truncated" not in await exchange.json()


class TestEvidence:
    def check(self, answer: dict[str, Any], size: int) -> None:
        spans = answer["evidence"]
        assert [span["start"] for span in spans] == [0, *(span["end"] for span in spans[:-1])]
        assert spans[-1]["end"] == size
        assert sum(span["tokens"] for span in spans) == answer["usage"]["tokens"]
        assert sum(span["weight"] for span in spans) == pytest.approx(1)
        for label, logit in logits(answer).items():
            shares = [span["weight"] * logits(span)[label] for span in spans]
            assert sum(shares) == pytest.approx(logit, rel=1e-6, abs=1e-6)
        for span in spans:
            assert [s["score"] for s in span["scores"]] == sorted(
                (s["score"] for s in span["scores"]), reverse=True
            )
            assert span["label"] == span["scores"][0]["label"] or len(span["scores"]) < len(LABELS)

    async def test_tiles_the_document_and_sums_to_its_logits(self, service: Service) -> None:
        answer = await service.classify(TEXT, evidence=True)
        TypeAdapter(Answer).validate_python(answer, strict=True)
        assert len(answer["evidence"]) == answer["usage"]["chunks"] > 1
        self.check(answer, len(TEXT.encode()))

    async def test_spans_differ(self, service: Service) -> None:
        spans = (await service.classify(TEXT, evidence=True))["evidence"]
        assert len({span["weight"] for span in spans}) > 1
        assert len({span["scores"][0]["logit"] for span in spans}) > 1

    async def test_lists_the_labels_of_the_answer(self, service: Service) -> None:
        answer = await service.classify(TEXT, evidence=True, top_k=2)
        self.check(answer, len(TEXT.encode()))
        for span in answer["evidence"]:
            assert logits(span).keys() == logits(answer).keys()

    @pytest.mark.parametrize("most", [2, 3, 4, 5])
    async def test_is_bounded_by_merging(self, checkpoint: Path, most: int) -> None:
        async with Service(checkpoint, max_evidence_spans=most) as service:
            answer = await service.classify(TEXT * 3, evidence=True)
        assert answer["usage"]["chunks"] > 2 * most
        assert 1 < len(answer["evidence"]) <= most
        self.check(answer, len(TEXT.encode()) * 3)
        tokens = [span["tokens"] for span in answer["evidence"]]
        assert len(set(tokens[:-1])) <= 1
        assert tokens[-1] <= tokens[0]

    async def test_covers_what_was_read_of_a_truncated_document(self, service: Service) -> None:
        answer = await service.classify(TEXT, evidence=True, max_tokens=21)
        self.check(answer, answer["usage"]["bytes"])


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
        TestEvidence().check(answer, len(TEXT.encode()))

    async def test_as_server_sent_events(self, service: Service) -> None:
        headers = {**PLAIN, "accept": "text/event-stream"}
        response = await service.http.post(PATH, content=TEXT, headers=headers)
        assert response.headers["content-type"] == "text/event-stream"
        assert response.text.endswith("\n\n")
        events = [event.split("\n") for event in response.text.removesuffix("\n\n").split("\n\n")]
        for name, data in events:
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['event']}"
        assert same(event, await service.classify(TEXT))

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


class TestErrors:
    @pytest.mark.parametrize(
        ("headers", "path", "body", "status", "error_type"),
        [
            (PLAIN, "", b"", 400, "Empty"),
            (PLAIN, "", b"abc\xff", 400, "NotUtf8"),
            (PLAIN, "", "é".encode()[:1], 400, "NotUtf8"),
            ({"content-type": "application/json"}, "", b"{", 400, "NotJson"),
            ({"content-type": "application/json"}, "", b"", 400, "NotJson"),
            ({"content-type": "application/json"}, "", b'{"text": "\xff"}', 400, "NotUtf8"),
            ({"content-type": "application/json"}, "", rb'{"text": "\ud800"}', 400, "NotJson"),
            ({"content-type": "application/json"}, "", b'{"text": ""}', 400, "Empty"),
            ({"content-type": "application/json"}, "", b"[]", 422, "Validation"),
            ({"content-type": "application/json"}, "", b"{}", 422, "Validation"),
            ({"content-type": "application/json"}, "", b'{"text": 1}', 422, "Validation"),
            ({"content-type": "application/json"}, "", b'{"text": "a", "x": 1}', 422, "Validation"),
            (
                {"content-type": "application/json"},
                "",
                b'{"text": "a", "top_k": "1"}',
                422,
                "Validation",
            ),
            (
                {"content-type": "application/json"},
                "",
                b'{"text": "a", "top_k": 0}',
                422,
                "Validation",
            ),
            ({"content-type": "application/json"}, "?top_k=1", b'{"text": "a"}', 422, "Validation"),
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

    async def test_name_what_is_wrong(self, service: Service) -> None:
        response = await service.http.post(PATH + "?topk=1", content=b"a", headers=PLAIN)
        assert "topk" in response.json()["error"]
        response = await service.http.post(PATH, json={"text": "a", "topk": 1})
        assert "topk" in response.json()["error"]
        response = await service.http.post(PATH, content=b"ab\xff", headers=PLAIN)
        assert "byte 2" in response.json()["error"]
        response = await service.http.post(PATH, content=b"a")
        assert "Content-Type: text/plain" in response.json()["error"]

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

        monkeypatch.setattr(service.gateway, "classify", broken)
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


class TestClientGone:
    """With one slot and little waiting room, a document needs the slot of the one before."""

    @pytest.fixture
    async def service(self, checkpoint: Path) -> AsyncIterator[Service]:
        limits = {"slots": 1, "max_waiting_documents": 1, "inbox_tokens": 8}
        async with Service(checkpoint, **limits) as service:
            yield service

    async def check(self, service: Service) -> None:
        assert await service.metric("gma_documents_in_flight") == 0
        assert await service.metric("gma_bytes_in_flight") == 0
        assert (await service.classify(TEXT))["label"] in LABELS
        assert await service.metric("gma_slots_in_use") == 0

    @pytest.mark.parametrize("headers", [PLAIN, NDJSON, {"content-type": "application/json"}])
    async def test_before_the_first_byte(self, service: Service, headers: dict[str, str]) -> None:
        async with Exchange(service.app, PATH, headers) as exchange:
            exchange.leave()
            await exchange.finished()
            assert not exchange.answered
        await self.check(service)

    @pytest.mark.parametrize("headers", [PLAIN, NDJSON])
    async def test_in_mid_upload(self, service: Service, headers: dict[str, str]) -> None:
        async with Exchange(service.app, PATH, headers) as exchange:
            exchange.send(TEXT.encode()[:200])
            await service.runner.step_begun()
            exchange.leave()
            await exchange.finished()
        await self.check(service)

    @pytest.mark.parametrize("headers", [PLAIN, NDJSON])
    async def test_in_mid_compute(self, service: Service, headers: dict[str, str]) -> None:
        async with Exchange(service.app, PATH, headers) as exchange:
            service.runner.go.clear()
            exchange.send(TEXT.encode() * 100, last=True)
            await service.runner.step_begun()
            exchange.leave()
            await exchange.finished()
            service.runner.go.set()
        await self.check(service)

    async def test_while_waiting_for_a_slot(self, service: Service) -> None:
        async with Exchange(service.app, PATH, PLAIN) as resident:
            resident.send(TEXT.encode())
            await service.runner.step_begun()
            async with Exchange(service.app, PATH, PLAIN) as exchange:
                exchange.send(TEXT.encode(), last=True)
                await service.until("gma_documents_waiting", 1)
                exchange.leave()
                await exchange.finished()
            await service.until("gma_documents_waiting", 0)
            resident.send(b"", last=True)
            assert (await resident.head())[0] == 200
            await resident.finished()
        await self.check(service)

    async def test_by_cancellation(self, service: Service) -> None:
        """How a server in front may tell it."""
        async with Exchange(service.app, PATH, PLAIN) as exchange:
            exchange.send(TEXT.encode())
            await service.runner.step_begun()
        await self.check(service)


class TestTogether:
    async def test_many_documents_are_answered_as_if_alone(self, checkpoint: Path) -> None:
        texts = [TEXT[start : start + 20 * start + 5] for start in range(24)]
        async with Service(checkpoint, slots=3) as service:
            alone = [await service.classify(text) for text in texts]
            together = await asyncio.gather(*map(service.classify, texts))
        for one, other in zip(alone, together, strict=True):
            assert same(one, other)

    async def test_draining_ends_what_was_taken_and_takes_nothing_new(
        self, service: Service
    ) -> None:
        async with Exchange(service.app, PATH, PLAIN) as exchange:
            exchange.send(TEXT.encode())
            await service.runner.step_begun()
            draining = asyncio.ensure_future(service.gateway.admission.drain())
            await asyncio.sleep(0)
            response = await service.http.post(PATH, content=TEXT, headers=PLAIN)
            assert (response.status_code, response.json()["error_type"]) == (503, "ShuttingDown")
            assert int(response.headers["retry-after"]) > 0
            assert not draining.done()
            exchange.send(b"", last=True)
            assert (await exchange.head())[0] == 200
            await draining
