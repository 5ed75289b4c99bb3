"""The whole service on Ray Serve, over a socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gma.service.app import local
from gma.service.app.deployments import build
from gma.service.app.start import StartError
from gma.service.settings import Settings
from tests.service.asgi import PATIENCE_S, TEXT, save_checkpoint
from tests.service.collector import Collector, collecting
from tests.service.running import PLAIN, Connection, Running, free_port, resident_peak

GATEWAYS = 2  # as there are on a small machine
LARGEST = 16 * 2**20  # bytes of a document
SLACK = 150_000_000  # bytes that a gateway may grow by besides: what passes through it


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")  # milliseconds
        patch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
        yield collector


@pytest.fixture(scope="module")
def service(checkpoint: Path, collector: Collector) -> Iterator[Running]:
    settings = Settings.load(
        checkpoint=checkpoint,
        port=free_port(),
        workers=2,
        gateways=GATEWAYS,
        rows=1,
        chunk_tokens=8,
        slots=4,
        max_waiting_documents=2,
        threads=1,
        max_document_bytes=LARGEST,
        max_bytes_in_flight=4 * LARGEST,
    )
    with local.running(settings):
        yield Running(settings)


@contextlib.contextmanager
def pidfd(pid: int) -> Iterator[int]:
    held = os.pidfd_open(pid)
    try:
        yield held
    finally:
        os.close(held)


@pytest.mark.slow
class TestRunning:
    def test_is_healthy_and_tells_what_it_is(self, service: Running) -> None:
        assert httpx.get(f"{service.url}/health", timeout=PATIENCE_S).status_code == 200
        info = httpx.get(f"{service.url}/info", timeout=PATIENCE_S).json()
        assert (info["model"], info["workers"], info["device"]) == ("tiny", 2, "cpu")

    def test_answers_have_one_request_id(self, service: Running) -> None:
        given = {"x-request-id": "mine-1"}
        for path in ("/health", "/nowhere"):
            response = httpx.get(service.url + path, headers=given, timeout=PATIENCE_S)
            assert response.headers.get_list("x-request-id") == ["mine-1"]

    def test_tells_what_components_take(self, service: Running) -> None:
        response = httpx.post(
            f"{service.url}/v1/documents?components=true",
            content=TEXT,
            headers=PLAIN,
            timeout=PATIENCE_S,
        )
        usage = response.json()["usage"]
        heads = [head for layer in usage["components"] for head in layer]
        assert len(heads) == 2 * 2
        assert [sum(head) for head in heads] == pytest.approx([usage["tokens"]] * 4, rel=1e-6)

    def test_a_trace_goes_from_the_client_to_the_collector(
        self, service: Running, collector: Collector
    ) -> None:
        trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        headers = PLAIN | {"traceparent": f"00-{trace}-{span}-01"}
        url = f"{service.url}/v1/documents"
        httpx.post(url, content=TEXT, headers=headers, timeout=PATIENCE_S)
        spans = collector.spans(5, PATIENCE_S)
        request = spans.pop("POST /v1/documents")
        assert (request["trace"], request["parent"], request["service"]) == (trace, span, "gma")
        assert spans.keys() == {"receive", "tokenize", "queue", "compute"}
        assert {each["parent"] for each in spans.values()} == {request["id"]}

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_only_workers_have_loaded_torch(self, service: Running) -> None:
        """Whatever a worker answers: its memory and the time to import it are for nothing there."""
        service.classify(TEXT)
        assert httpx.get(f"{service.url}/info", timeout=PATIENCE_S).status_code == 200
        for role, loaded in (("worker", True), ("gateway", False)):
            maps = [Path(f"/proc/{pid}/maps").read_text() for pid in service.processes(role)]
            assert maps
            assert all(("libtorch" in each) is loaded for each in maps), role

    def test_reads_pieces_of_many_documents_on_the_worker_that_has_each(
        self, service: Running
    ) -> None:
        alone = service.classify(TEXT)

        async def upload() -> dict[str, Any]:
            body = TEXT.encode()
            async with Connection.open(service.port, "application/x-ndjson") as connection:
                await connection.send(body[:100])
                await connection.event()  # so that the next is a call of its own
                for start in range(100, len(body), 50):
                    await connection.send(body[start : start + 50])
                await connection.send(b"", last=True)
                while (event := await connection.event())["event"] == "progress":
                    pass
                return event

        async def together() -> list[dict[str, Any]]:
            return await asyncio.gather(*(upload() for _ in range(6)))

        for answer in asyncio.run(together()):
            assert answer["event"] == "result"
            assert answer["usage"] == alone["usage"]
            assert answer["scores"][0]["logit"] == pytest.approx(
                alone["scores"][0]["logit"], rel=1e-5, abs=1e-5
            )

    def test_workers_tell_that_they_are_full(self, service: Running) -> None:
        """An error on its way through two processes."""

        async def fill() -> Any:
            """One document more than two workers have slots and places to wait."""
            async with contextlib.AsyncExitStack() as stack:
                answers = {}
                for _ in range(2 * (4 + 2) + 1):
                    opening = Connection.open(service.port, "application/json")
                    connection = await stack.enter_async_context(opening)
                    await connection.send(b"a " * 500)
                    head = asyncio.ensure_future(connection.line_with(b"HTTP/1.1"))
                    answers[head] = connection
                (first, *_), rest = await asyncio.wait(answers, return_when="FIRST_COMPLETED")
                for answer in rest:
                    answer.cancel()
                assert b" 429 " in first.result()
                await answers[first].line_with(b"\r\n")
                return await answers[first].json()

        assert asyncio.run(fill())["error_type"] == "Overloaded"
        service.settle(gma_slots_in_use=0, gma_documents_waiting=0, gma_documents_in_flight=0)

    @pytest.mark.parametrize("last", [False, True], ids=["in-mid-upload", "in-mid-compute"])
    @pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
    def test_a_client_that_leaves_frees_its_slot(
        self, service: Running, accept: str, last: bool
    ) -> None:
        async def leave() -> None:
            async with Connection.open(service.port, accept) as connection:
                await connection.send(TEXT.encode() * (1000 if last else 1), last=last)
                if accept == "application/x-ndjson":
                    await connection.event()
                else:
                    await asyncio.to_thread(service.settle, gma_slots_in_use=1)

        asyncio.run(leave())
        service.settle(gma_slots_in_use=0, gma_documents_in_flight=0, gma_bytes_in_flight=0)

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_a_gateways_memory_is_bound_whatever_is_sent(self, service: Running) -> None:
        gateways = service.processes("gateway")
        service.classify(TEXT)
        body = b"a" * LARGEST
        most = 4 * GATEWAYS

        async def offer(client: httpx.AsyncClient) -> int:
            url = f"{service.url}/v1/documents"
            try:
                return (await client.post(url, content=body, headers=PLAIN)).status_code
            except httpx.TransportError:  # it still sent long after it had been refused
                return 429

        async def refused(many: int) -> int:
            """Offer so many, and leave once all have been refused that have to be."""
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(timeout=4 * PATIENCE_S, limits=limits) as client:
                offers = [asyncio.create_task(offer(client)) for _ in range(many)]
                found = 0
                for answer in asyncio.as_completed(offers):
                    assert await answer == 429
                    found += 1
                    if found == many - most:
                        break
                for each in offers:
                    each.cancel()
                await asyncio.gather(*offers, return_exceptions=True)
            return found

        before = [resident_peak(pid) for pid in gateways]
        assert asyncio.run(refused(48)) == 48 - most
        service.settle(gma_documents_in_flight=0, gma_bytes_in_flight=0)
        after = [resident_peak(pid) for pid in gateways]
        grown = [now - then for now, then in zip(after, before, strict=True)]
        assert max(grown) < 2 * 4 * LARGEST + SLACK

    def test_nobody_notices_a_lost_gateway_which_is_replaced(self, service: Running) -> None:
        lost = service.processes("gateway")[0]
        with pidfd(lost) as gone:
            os.kill(lost, signal.SIGKILL)
            select.select([gone], [], [])
        for _ in range(50):
            service.classify(TEXT)
        until = time.monotonic() + PATIENCE_S
        while len(service.processes("gateway")) < GATEWAYS:
            assert time.monotonic() < until
        assert lost not in service.processes("gateway")
        service.settle(gma_documents_in_flight=0)

    def test_a_deployment_that_fails_says_why(self, service: Running, tmp_path: Path) -> None:
        folder = save_checkpoint(tmp_path)
        (folder / "model.safetensors").write_bytes(b"damaged")
        settings = Settings.load(checkpoint=folder, device="cpu", port=free_port())
        with pytest.raises(StartError, match=r"model\.safetensors: ") as raised:
            local.deploy(build(settings, run=tmp_path), name="damaged")
        assert "\n" not in str(raised.value)

    def test_a_deployment_that_fails_unforeseen_says_its_exception(
        self, service: Running, checkpoint: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "file"
        file.touch()
        settings = Settings.load(
            checkpoint=checkpoint, device="cpu", port=free_port(), metrics_dir=file / "metrics"
        )
        with pytest.raises(StartError) as raised:
            local.deploy(build(settings, run=tmp_path), name="unforeseen")
        assert re.fullmatch(
            rf"the deployment (Gateway|Worker) failed: NotADirectoryError: .*'{file}/metrics'",
            str(raised.value),
        )

    def test_a_document_goes_on_when_its_worker_is_lost_and_replaced(
        self, service: Running
    ) -> None:
        async def lose() -> dict[str, Any]:
            async with Connection.open(service.port, "application/x-ndjson") as connection:
                await connection.send(TEXT.encode())
                await connection.event()
                for pid in service.processes("worker"):
                    os.kill(pid, signal.SIGKILL)
                await connection.send(TEXT.encode(), last=True)
                while (event := await connection.event(seconds=4 * PATIENCE_S))[
                    "event"
                ] == "progress":
                    pass
                return event

        result = asyncio.run(lose())
        assert (result["event"], result["usage"]["bytes"]) == ("result", 2 * len(TEXT.encode()))
        service.settle(gma_documents_in_flight=0)

        def answers() -> bool:
            response = httpx.post(
                f"{service.url}/v1/documents", content=TEXT, headers=PLAIN, timeout=60
            )
            assert response.status_code in (200, 503), response.text
            assert response.status_code == 200 or "retry-after" in response.headers
            return response.status_code == 200

        assert any(answers() for _ in range(6))
