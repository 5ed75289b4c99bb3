"""POST /v1/documents, through ASGI, with a real engine and a tiny model: what it answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter

from gma.service.gateway.contract import Answer, Options
from gma.service.gateway.document import PIECE_BYTES
from gma.service.http.json_document import parsed
from tests.service.answers import JSON, PATH, PLAIN, check_evidence, logits, same
from tests.service.asgi import LABELS, TEXT, Exchange, Service, save_checkpoint

pytestmark = pytest.mark.anyio


@pytest.fixture
def service(lasting: Service) -> Service:
    return lasting


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

    async def test_drops_a_byte_order_mark_and_counts_it(self, service: Service) -> None:
        plain = await service.classify(TEXT, evidence=True)
        marked = await service.classify("\ufeff" + TEXT, evidence=True)
        check_evidence(marked, len(TEXT.encode()) + 3)
        assert logits(marked) == pytest.approx(logits(plain))
        assert marked["usage"] == plain["usage"] | {"bytes": plain["usage"]["bytes"] + 3}
        twice = await service.classify("\ufeff\ufeff" + TEXT)
        assert twice["usage"]["tokens"] > plain["usage"]["tokens"]
        response = await service.http.post(
            PATH, content="\ufeffab".encode() + b"\xff", headers=PLAIN
        )
        assert "at byte 5" in response.json()["error"]

    @pytest.mark.parametrize("size", [1, 2, 3, 4])
    async def test_a_byte_order_mark_in_pieces(self, service: Service, size: int) -> None:
        body = ("\ufeff" + TEXT).encode()
        async with Exchange(service.app, PATH, PLAIN) as exchange:
            exchange.send(body[:size])
            exchange.send(body[size:], last=True)
            await exchange.head()
            assert same(await exchange.json(), await service.classify(body))


async def whole(body: bytes, size: int = PIECE_BYTES) -> AsyncIterator[tuple[bytes, bool]]:
    """A body as it comes, so much at once."""
    for start in range(0, len(body), size):
        yield body[start : start + size], start + size >= len(body)


class TestJson:
    @pytest.mark.parametrize("ascii_only", [False, True])
    @pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b" \r\n\t"])
    async def test_is_read_as_its_text(
        self, service: Service, ascii_only: bool, before: bytes
    ) -> None:
        text = 'a "quoted" \\ backslash / \b\f\n\r\t ' + TEXT
        body = before + json.dumps({"text": text}, ensure_ascii=ascii_only, indent=2).encode()
        response = await service.http.post(PATH, content=body, headers=JSON)
        assert same(response.json(), await service.classify(text))

    async def test_names_may_be_escaped_and_integers_have_a_point(self, service: Service) -> None:
        body = rb'{"top\u005fk": 2.0, "evidence": false, "max_tokens": null, "text": "a"}'
        response = await service.http.post(PATH, content=body, headers=JSON)
        assert len(response.json()["scores"]) == 2

    async def test_its_options_count_before_those_of_the_query(self, service: Service) -> None:
        async def listed(**options: int) -> int:
            body = {"text": "a", **options}
            response = await service.http.post(PATH, json=body, params={"top_k": 2})
            return len(response.json()["scores"])

        assert await listed() == 2
        assert await listed(top_k=1) == 1
        assert await listed(max_tokens=10) == 2

    @pytest.mark.parametrize("ascii_only", [False, True])
    @pytest.mark.parametrize("at", range(14))
    async def test_is_cut_between_characters(self, ascii_only: bool, at: int) -> None:
        """Where a piece would end there is each part of characters, and of their escapes."""
        text = "a" * (PIECE_BYTES - at) + "é漢🚢\\\n🚢" * 3 + "b" * PIECE_BYTES
        body = json.dumps({"text": text}, ensure_ascii=ascii_only).encode()
        _, found = await parsed(whole(body), Options())
        pieces = [piece async for piece in found.pieces()]
        assert b"".join(piece for piece, _ in pieces) == text.encode()
        assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
        assert all(len(piece) <= PIECE_BYTES for piece, _ in pieces)
        assert all(piece.decode() for piece, _ in pieces)

    @pytest.mark.parametrize("ascii_only", [False, True])
    @pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64])
    async def test_may_come_in_any_pieces(self, ascii_only: bool, size: int) -> None:
        text = 'a "quoted" \\ backslash / \b\f\n\r\té漢🚢é\\\n🚢' * 3
        sent = {"max_tokens": None, "evidence": True, "text": text, "top_k": 20000000}
        body = b"\xef\xbb\xbf" + json.dumps(sent, ensure_ascii=ascii_only, indent=20).encode()
        options, found = await parsed(whole(body, size), Options())
        assert options == Options(evidence=True, top_k=20000000)
        assert b"".join([piece async for piece, _ in found.pieces()]) == text.encode()


class TestPieces:
    @pytest.mark.parametrize("size", [1, 7, 64])
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


class TestTogether:
    @pytest.mark.parametrize("form", ["paper", "forgetting"])
    async def test_many_documents_are_answered_as_if_alone(self, tmp_path: Path, form: str) -> None:
        texts = [TEXT[start : start + 20 * start + 5] for start in range(12)]
        async with Service(save_checkpoint(tmp_path, form=form), slots=3) as service:
            alone = [await service.classify(text) for text in texts]
            together = await asyncio.gather(*map(service.classify, texts))
        for one, other in zip(alone, together, strict=True):
            assert same(one, other)

    async def test_draining_ends_what_was_taken_and_takes_nothing_new(
        self, checkpoint: Path
    ) -> None:
        async with (
            Service(checkpoint) as service,
            Exchange(service.app, PATH, PLAIN) as exchange,
        ):
            exchange.send(TEXT.encode())
            await service.runner.step_begun()
            draining = asyncio.ensure_future(service.gateway.admission.drain())
            await asyncio.sleep(0)
            response = await service.http.post(PATH, content=TEXT, headers=PLAIN)
            assert (response.status_code, response.json()["error_type"]) == (
                503,
                "ShuttingDown",
            )
            assert int(response.headers["retry-after"]) > 0
            assert not draining.done()
            exchange.send(b"", last=True)
            assert (await exchange.head())[0] == 200
            await draining
