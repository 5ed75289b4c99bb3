"""Sessions over HTTP. A document in one piece is the measure: to the last bit."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from gma.service.http.keys import hash_of, new_key
from gma.service.settings import Settings
from tests.service.asgi import TEXT, Exchange, Service, save_checkpoint, serving
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

pytestmark = pytest.mark.anyio

EXPORTED = Path(__file__).parent.parent.parent / "data" / "exported"

DATA = "\ufeffÇa va: 漢字も🚢 of the sea, and nobody\r\n spoke. 👩‍👩‍👧".encode()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "sessions"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def service(checkpoint: Path, store: Path, clock: Clock) -> AsyncIterator[Service]:
    async with Service(checkpoint, clock, sessions=store, session_ttl_s=100) as service:
        yield service


async def filled(service: Service, data: bytes = DATA) -> str:
    session = await create(service)
    assert (await append(service, session, 0, data)).status_code == 200
    return session


async def refused(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    told: dict[str, Any] = response.json()
    assert (response.status_code, told["error_type"]) == (status, kind)
    return told


async def test_a_text_that_comes_byte_by_byte_is_answered_as_the_whole(service: Service) -> None:
    session, one = await create(service), OneShot(service)
    assert await answer(service, session)
    for end in range(1, len(DATA) + 1):
        response = await append(service, session, end - 1, DATA[end - 1 : end])
        assert response.status_code == 200
        assert response.headers["x-inference-time"]
        await one.check(response.json(), DATA[:end])
    await one.check(await answer(service, session), DATA)


@pytest.mark.parametrize("first", range(1, 8))
async def test_a_mark_is_one_only_if_a_character_follows(service: Service, first: int) -> None:
    """And not a part of one: else the answer would depend on where the text was cut."""
    session, one, data = await create(service), OneShot(service), "\ufeff🚢".encode()
    await one.check((await append(service, session, 0, data[:first])).json(), data[:first])
    await one.check((await append(service, session, first, data[first:])).json(), data)


@pytest.mark.parametrize("size", [90, 5000])
async def test_a_text_of_many_chunks(service: Service, size: int) -> None:
    data = (TEXT * 4).encode()
    session = await create(service)
    for start in range(0, len(data), size):
        response = await append(service, session, start, data[start : start + size])
    await OneShot(service).check(response.json(), data)


async def test_an_exported_model(store: Path) -> None:
    pytest.importorskip("onnxruntime")
    settings = Settings.load(checkpoint=EXPORTED, device="cpu", sessions=store, rows=1)
    async with serving(settings) as http:
        session = (await http.post(SESSIONS)).json()["id"]
        data = TEXT.encode()
        for start in range(0, len(data), 50):
            response = await http.patch(
                f"{SESSIONS}/{session}",
                content=data[start : start + 50],
                headers={"content-type": "text/plain", "upload-offset": str(start)},
            )
        one = await http.post("/v1/documents", content=data, headers={"content-type": "text/plain"})
        assert response.json()["scores"] == one.json()["scores"]
        assert response.json()["usage"] == one.json()["usage"]


async def test_an_append_reads_what_it_brings_and_less_than_a_chunk(service: Service) -> None:
    session = await filled(service, TEXT.encode())
    before = await service.metric("gma_tokens_total")
    await append(service, session, len(TEXT.encode()), b"!")
    assert await service.metric("gma_tokens_total") < before + 8 + 131


async def test_an_empty_append_is_answered_and_keeps_the_session(
    service: Service, clock: Clock
) -> None:
    session = await filled(service)
    clock.now += 90
    await OneShot(service).check((await append(service, session, len(DATA), b"")).json(), DATA)
    clock.now += 90
    await answer(service, session)


async def test_evidence_tells_what_was_before_and_tiles_what_came(service: Service) -> None:
    data = TEXT.encode()
    session = await filled(service, data[:200])
    found = (await append(service, session, 200, data[200:], evidence=True)).json()
    spans = found["evidence"]
    assert spans[0]["start"] == 0
    assert [span["end"] for span in spans[:-1]] == [span["start"] for span in spans[1:]]
    assert spans[-1]["end"] == found["usage"]["bytes"] == len(data)
    assert sum(span["tokens"] for span in spans) == found["usage"]["tokens"]
    assert 0 < 200 - spans[0]["end"] < 8 * 131
    logits = {each["label"]: each["logit"] for each in found["scores"]}
    for label, logit in logits.items():
        own = [
            span["weight"] * each["logit"]
            for span in spans
            for each in span["scores"]
            if each["label"] == label
        ]
        assert sum(own) == pytest.approx(logit, abs=1e-6)
    marked = await create(service)
    response = await append(service, marked, 0, DATA, evidence=True, top_k=1)
    assert response.json()["evidence"][0]["start"] == 0
    assert response.json()["evidence"][-1]["end"] == len(DATA)
    assert len(response.json()["scores"]) == len((await answer(service, marked, top_k=1))["scores"])


class TestOffsets:
    @pytest.mark.parametrize("offset", [0, len(DATA) - 1, len(DATA) + 1, 2**62])
    async def test_a_wrong_one_is_told_the_right_one(self, service: Service, offset: int) -> None:
        session = await filled(service)
        response = await append(service, session, offset, b"more")
        await refused(response, 409, "WrongOffset")
        assert response.headers["upload-offset"] == str(len(DATA))
        await OneShot(service).check(await answer(service, session), DATA)

    @pytest.mark.parametrize("offset", ["-1", "x", "1.0", "0x1", str(2**63), ""])
    async def test_what_is_none_is_refused(self, service: Service, offset: str) -> None:
        session = await create(service)
        await refused(await append(service, session, offset, b"more"), 422, "Validation")

    async def test_of_two_writers_at_once_one_is_told_the_others(self, service: Service) -> None:
        session = await filled(service)
        service.runner.hold()
        texts = [b" one and the other", b" another"]
        writers = [asyncio.create_task(append(service, session, len(DATA), text)) for text in texts]
        await service.runner.step_begun()
        service.runner.go.set()
        responses = await asyncio.gather(*writers)
        assert sorted(each.status_code for each in responses) == [200, 409]
        won = [each.status_code for each in responses].index(200)
        data = DATA + texts[won]
        assert responses[1 - won].headers["upload-offset"] == str(len(data))
        await OneShot(service).check(responses[won].json(), data)
        await OneShot(service).check(await answer(service, session), data)


class TestWhatIsWrong:
    async def test_text_that_is_not_utf8_changes_nothing(self, service: Service) -> None:
        session = await filled(service)
        told = await refused(await append(service, session, len(DATA), b"a\xff"), 400, "NotUtf8")
        assert f"at byte {len(DATA) + 1}" in told["error"]
        await OneShot(service).check(await answer(service, session), DATA)

    async def test_a_client_that_leaves_changes_nothing(self, service: Service) -> None:
        session = await filled(service)
        service.runner.hold()
        headers = {"content-type": "text/plain", "upload-offset": str(len(DATA))}
        path = f"{SESSIONS}/{session}"
        async with Exchange(service.app, path, headers, method="PATCH") as upload:
            upload.send(TEXT.encode())
            await service.runner.step_begun()
            upload.leave()
            service.runner.go.set()
            await upload.finished()
        await OneShot(service).check(await answer(service, session), DATA)

    async def test_a_step_that_fails_changes_nothing(self, service: Service) -> None:
        session = await filled(service)
        service.runner.fails = True
        await refused(await append(service, session, len(DATA), b" a"), 500, "StepFailed")
        service.runner.fails = False
        response = await append(service, session, len(DATA), b" a")
        await OneShot(service).check(response.json(), DATA + b" a")

    async def test_other_content(self, service: Service) -> None:
        session = await create(service)
        for kind in ("application/json", "image/png"):
            response = await append(service, session, 0, b"{}", {"content-type": kind})
            await refused(response, 415, "UnsupportedContent")
        response = await service.http.post(SESSIONS, content=b"text", headers={})
        await refused(response, 415, "UnsupportedContent")

    async def test_too_much_at_once(self, checkpoint: Path, store: Path) -> None:
        limits = {"max_document_bytes": 100, "max_bytes_in_flight": 1000}
        async with Service(checkpoint, sessions=store, **limits) as service:
            session = await create(service)
            await refused(await append(service, session, 0, b"a" * 101), 413, "TooLarge")
            for start in (0, 100):  # any number of them
                response = await append(service, session, start, b"a" * 100)
            assert response.json()["offset"] == 200

    async def test_an_unknown_option(self, service: Service) -> None:
        session = await create(service)
        response = await append(service, session, 0, b"a", max_tokens=3)
        await refused(response, 422, "Validation")

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
    async def test_a_store_that_fails_changes_nothing(
        self, service: Service, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        session = await filled(service)

        def fails(_: int) -> None:
            raise OSError(number, "no")

        full = number in (errno.ENOSPC, errno.EDQUOT)
        status, kind = (507, "StoreFull") if full else (503, "StoreFailed")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fails)
            await refused(await append(service, session, len(DATA), b" a"), status, kind)
            await refused(await service.http.post(SESSIONS), status, kind)
            fork = await service.http.post(f"{SESSIONS}/{session}/fork")
            await refused(fork, status, kind)
            await OneShot(service).check(await answer(service, session), DATA)
        response = await append(service, session, len(DATA), b" a")
        await OneShot(service).check(response.json(), DATA + b" a")


def damage(store: Path) -> None:
    """Cut one session's file."""
    file = next(store.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


async def every_request(service: Service, session: str, **headers: str) -> list[httpx.Response]:
    """All that can be asked for of a session, deleting it last."""
    path = f"{SESSIONS}/{session}"
    return [
        await append(service, session, len(DATA), b" a", headers),
        await service.http.get(path, headers=headers),
        await service.http.get(f"{path}/snapshot", headers=headers),
        await service.http.post(f"{path}/fork", headers=headers),
        await service.http.delete(path, headers=headers),
    ]


class TestWhatIsNotThere:
    async def test_is_unknown(self, service: Service) -> None:
        gone = await filled(service)
        assert (await service.http.delete(f"{SESSIONS}/{gone}")).status_code == 204
        for session in (gone, "x", "%00", "..%5c", "é" * 30):
            for response in await every_request(service, session):
                await refused(response, 404, "UnknownSession")

    async def test_is_unknown_if_it_goes_while_it_is_read(self, service: Service) -> None:
        session = await filled(service)
        service.runner.hold()
        writer = asyncio.create_task(append(service, session, len(DATA), b" a"))
        await service.runner.step_begun()
        assert (await service.http.delete(f"{SESSIONS}/{session}")).status_code == 204
        service.runner.go.set()
        await refused(await writer, 404, "UnknownSession")
        assert (await service.http.get(f"{SESSIONS}/{session}")).status_code == 404

    async def test_has_expired(self, service: Service, clock: Clock) -> None:
        session = await filled(service)
        clock.now += 101
        for response in await every_request(service, session):
            await refused(response, 410, "SessionGone")
        assert service.gateway.store
        service.gateway.store.sweep(clock.now)
        await refused(await service.http.get(f"{SESSIONS}/{session}"), 410, "SessionGone")
        clock.now += 100
        service.gateway.store.sweep(clock.now)
        await refused(await service.http.get(f"{SESSIONS}/{session}"), 404, "UnknownSession")

    async def test_expires_while_an_append_runs_that_counts(
        self, service: Service, clock: Clock
    ) -> None:
        session = await filled(service)
        service.runner.hold()
        writer = asyncio.create_task(append(service, session, len(DATA), b" a"))
        await service.runner.step_begun()
        clock.now += 150
        await refused(await service.http.get(f"{SESSIONS}/{session}"), 410, "SessionGone")
        service.runner.go.set()
        await OneShot(service).check((await writer).json(), DATA + b" a")
        await OneShot(service).check(await answer(service, session), DATA + b" a")


class TestWhose:
    async def test_another_key_finds_nothing(
        self, checkpoint: Path, store: Path, tmp_path: Path
    ) -> None:
        keys = [new_key(), new_key()]
        file = tmp_path / "keys"
        file.write_text("".join(f"{hash_of(key)}\n" for key in keys))
        mine, others = ({"authorization": f"Bearer {key}"} for key in keys)
        async with Service(checkpoint, sessions=store, api_keys_file=file) as service:
            assert (await service.http.post(SESSIONS)).status_code == 401
            session = await create(service, headers=mine)
            assert (await append(service, session, 0, DATA, mine)).status_code == 200
            for response in await every_request(service, session, **others):
                await refused(response, 404, "UnknownSession")
            for response in await every_request(service, session, **mine):
                assert response.is_success


class TestOtherProcesses:
    async def test_another_gateway_and_another_worker_go_on(
        self, checkpoint: Path, store: Path, service: Service
    ) -> None:
        session = await filled(service, DATA[:40])
        async with Service(checkpoint, Clock(), sessions=store) as other:
            response = await append(other, session, 40, DATA[40:])
            await OneShot(service).check(response.json(), DATA)
        await OneShot(service).check(await answer(service, session), DATA)

    async def test_another_model_does_not(
        self, store: Path, service: Service, tmp_path: Path
    ) -> None:
        session = await filled(service, TEXT.encode())
        taken = await snapshot(service, session)
        wider = save_checkpoint(tmp_path / "wider", num_components=5)
        async with Service(wider, Clock(), sessions=store) as other:
            response = await append(other, session, len(TEXT.encode()), b" a")
            await refused(response, 410, "SessionGone")
            response = await other.http.post(SESSIONS, content=taken, headers=SNAPSHOT)
            told = await refused(response, 422, "BadSnapshot")
            assert "another model" in told["error"]
        response = await append(service, session, len(TEXT.encode()), b" a")
        assert response.status_code == 200


class TestForksAndSnapshots:
    async def test_a_fork_of_a_fork_does_not_feel_its_parents_growth(
        self, service: Service
    ) -> None:
        one = OneShot(service)
        data = {await filled(service): DATA}
        for _ in range(2):
            parent = [*data][-1]
            response = await service.http.post(f"{SESSIONS}/{parent}/fork")
            data[response.json()["id"]] = data[parent]
            text = f" grown {len(data)}".encode()
            assert (await append(service, parent, len(data[parent]), text)).status_code == 200
            data[parent] += text
        for session, expected in data.items():
            await one.check(await answer(service, session), expected)
            response = await append(service, session, len(expected), " ↑".encode())
            await one.check(response.json(), expected + " ↑".encode())

    async def test_a_snapshot_goes_on_where_it_was_taken(self, service: Service) -> None:
        session = await filled(service, DATA[:50])
        taken = await snapshot(service, session)
        await append(service, session, 50, b"! other")
        resumed = await create(service, content=taken, headers=SNAPSHOT)
        await OneShot(service).check(await answer(service, resumed), DATA[:50])
        response = await append(service, resumed, 50, DATA[50:])
        await OneShot(service).check(response.json(), DATA)

    async def test_a_snapshot_of_another_service_is_refused(
        self, service: Service, checkpoint: Path, tmp_path: Path
    ) -> None:
        taken = await snapshot(service, await filled(service))
        async with Service(checkpoint, sessions=tmp_path / "others") as other:
            response = await other.http.post(SESSIONS, content=taken, headers=SNAPSHOT)
            await refused(response, 422, "BadSnapshot")

    async def test_one_that_was_changed_is_refused_and_no_session_is_touched(
        self, service: Service
    ) -> None:
        session = await filled(service)
        taken = await snapshot(service, session)
        rng = np.random.default_rng(0)
        changed = [taken[:-1], taken + b"\0", b"\0", taken[8:], bytes(len(taken))]
        scalar = taken.replace(b"[1]", b"[ ]")  # the same numbers in other shapes
        assert scalar != taken
        changed.append(scalar)
        changed += [
            taken[:place] + bytes([taken[place] ^ 1]) + taken[place + 1 :]
            for place in rng.integers(0, len(taken), 20).tolist()
        ]
        for each in changed:
            response = await service.http.post(SESSIONS, content=each, headers=SNAPSHOT)
            await refused(response, 422, "BadSnapshot")
        await OneShot(service).check(await answer(service, session), DATA)

    async def test_what_is_stored_and_damaged_is_gone(self, service: Service, store: Path) -> None:
        session, other = await filled(service), await filled(service)
        damage(store)
        told = [(await service.http.get(f"{SESSIONS}/{x}")).status_code for x in (session, other)]
        assert sorted(told) == [200, 410]


class TestNone:
    @pytest.mark.parametrize("causal", [True, False])
    async def test_where_none_are_kept(self, tmp_path: Path, causal: bool) -> None:
        folder = save_checkpoint(tmp_path / "model", causal=causal)
        settings = Settings.load(
            checkpoint=folder, sessions=None if causal else tmp_path / "store", chunk_tokens=8
        )
        async with serving(settings) as http:
            headers = {"content-type": "text/plain", "upload-offset": "0"}
            path = f"{SESSIONS}/x"
            for response in (
                await http.post(SESSIONS),
                await http.patch(path, content=b"a", headers=headers),
                await http.get(path),
                await http.get(f"{path}/snapshot"),
                await http.post(f"{path}/fork"),
                await http.delete(path),
            ):
                told = await refused(response, 501, "NoSessions")
                assert ("GMA_SESSIONS" in told["error"]) == causal
            assert (await http.get("/info")).json()["sessions"] is False

    async def test_where_they_are(self, service: Service) -> None:
        assert (await service.http.get("/info")).json()["sessions"] is True


async def test_every_method_of_a_path_is_told(service: Service) -> None:
    response = await service.http.options(f"{SESSIONS}/x")
    assert response.status_code == 204
    assert {*response.headers["allow"].split(", ")} == {
        "GET",
        "HEAD",
        "PATCH",
        "DELETE",
        "OPTIONS",
    }
    await refused(await service.http.post(f"{SESSIONS}/x"), 405, "MethodNotAllowed")
