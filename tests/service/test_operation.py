"""Health, info, metrics, docs, and what every answer has in common."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter

from gma.service.engine.step import Outcome
from gma.service.gateway.contract import Info
from gma.service.link import lasting
from gma.service.observe.logs import JsonFormatter
from gma.service.worker import LOST_AFTER
from tests.service.asgi import LABELS, TEXT, Service

pytestmark = pytest.mark.anyio

PLAIN = {"content-type": "text/plain"}


class TestHealth:
    async def test_once_warm(self, service: Service) -> None:
        response = await service.http.get("/health")
        assert (response.status_code, response.json()) == (200, {"status": "ok"})

    async def check(self, service: Service, error_type: str) -> None:
        response = await service.http.get("/health")
        assert (response.status_code, response.json()["error_type"]) == (503, error_type)
        assert int(response.headers["retry-after"]) > 0

    async def test_not_before(self, checkpoint: Path) -> None:
        await self.check(Service(checkpoint), "NotReady")

    async def test_not_after_a_failed_warm_up(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        service = Service(checkpoint)

        def fail() -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(service.runner, "warm_up", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            await service.worker.start()
        assert not service.worker.ready
        await self.check(service, "NotReady")

    async def test_not_once_the_engine_has_died(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        service = Service(checkpoint)
        await service.worker.start()
        monkeypatch.setattr(service.runner, "step", lambda batch: "a bug")
        monkeypatch.setattr(lasting, "PATIENCE_S", 0.0)  # no other worker comes
        response = await service.http.post("/v1/documents", content=TEXT, headers=PLAIN)
        assert (response.status_code, response.json()["error_type"]) == (503, "ShuttingDown")
        await self.check(service, "NotReady")
        with pytest.raises(RuntimeError, match="the engine has stopped"):
            service.worker.check_health()
        with pytest.raises(AttributeError):
            await service.worker.stop()

    async def test_a_worker_whose_device_is_lost_asks_to_be_replaced(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        step = service.runner.step

        def fail(_: object) -> Outcome:
            raise RuntimeError("an illegal memory access was encountered")

        monkeypatch.setattr(service.runner, "step", fail)
        for _ in range(LOST_AFTER):
            service.worker.check_health()
            response = await service.http.post("/v1/documents", content=TEXT, headers=PLAIN)
            assert (response.status_code, response.json()["error_type"]) == (500, "StepFailed")
        with pytest.raises(RuntimeError, match=f"the last {LOST_AFTER} steps failed"):
            service.worker.check_health()
        monkeypatch.setattr(service.runner, "step", step)
        await service.classify(TEXT)
        service.worker.check_health()

    async def test_not_while_draining(self, service: Service) -> None:
        await service.gateway.admission.drain()
        await self.check(service, "ShuttingDown")


async def test_info(service: Service) -> None:
    info = (await service.http.get("/info")).json()
    TypeAdapter(Info).validate_python(info, strict=True)
    assert info["model"] == "tiny"
    assert info["labels"] == list(LABELS)
    assert (info["backend"], info["device"], info["dtype"]) == ("torch", "cpu", "float32")
    assert info["kernels"].startswith("C++ for ")
    assert len(info["fingerprint"]) == 64
    assert (info["rows"], info["chunk_tokens"], info["slots"]) == (2, 8, 4)
    assert info["limits"]["max_document_bytes"] == service.settings.max_document_bytes


class TestMetrics:
    async def test_count_documents(self, service: Service) -> None:
        before = await service.metric("gma_tokens_total")
        answer = await service.classify(TEXT)
        assert await service.metric("gma_tokens_total") == before + answer["usage"]["tokens"]
        # Of this model: other tests' workers were of this process too.
        assert 'gma_slots{model="tiny"} 4.0' in (await service.http.get("/metrics")).text
        assert await service.metric("gma_slots_in_use") == 0
        assert await service.metric("gma_documents_in_flight") == 0

    async def test_are_named_explained_and_bounded(self, service: Service) -> None:
        await service.classify(TEXT)
        for path in ("/nowhere", "/v1/documents/7", "/%F0%9F%9A%A2"):
            await service.http.get(path)
        text = (await service.http.get("/metrics")).text
        ours = [f for f in text_string_to_metric_families(text) if f.name.startswith("gma_")]
        assert {
            "gma_requests",
            "gma_documents_in_flight",
            "gma_tokens",
            "gma_queue_seconds",
            "gma_tokenize_seconds",
            "gma_step_seconds",
            "gma_request_seconds",
            "gma_slots_in_use",
            "gma_resident_memory_bytes",
            "gma_resident_memory_peak_bytes",
            "gma_device_memory_bytes",
            "gma_device_memory_peak_bytes",
        } <= {family.name for family in ours}
        assert all(family.documentation for family in ours)
        routes = {
            sample.labels["route"] for f in ours for sample in f.samples if "route" in sample.labels
        }
        there_are = (await service.http.get("/openapi.json")).json()["paths"].keys()
        assert routes <= {*there_are, "/docs", "/openapi.json", "/page/{name}", "other"}

    def test_of_every_process_of_a_machine(self, tmp_path: Path) -> None:
        """Counts of the dead stay; what they said of the present goes."""
        run = (
            "import sys, pathlib; from gma.service.observe import sharing;"
            "sharing.join(pathlib.Path(sys.argv[1])); from gma.service.observe import metrics;"
            "metrics.TOKENS.labels('a').inc(3); metrics.SLOTS.labels('a').set(5);"
            "print(metrics.scrape().decode())"
        )
        for tokens in (3.0, 6.0):
            done = subprocess.run(
                [sys.executable, "-c", run, tmp_path], check=True, capture_output=True, text=True
            )
            lines = done.stdout.splitlines()
            assert f'gma_tokens_total{{model="a"}} {tokens}' in lines
            assert 'gma_slots{model="a"} 5.0' in lines


class TestEveryAnswer:
    @pytest.fixture
    def service(self, lasting: Service) -> Service:
        return lasting

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/health", 200),
            ("GET", "/nowhere", 404),
            ("GET", "/v1/documents", 405),
            ("POST", "/v1/documents", 415),
        ],
    )
    async def test_has_the_request_id(
        self, service: Service, method: str, path: str, status: int
    ) -> None:
        given = await service.http.request(method, path, headers={"x-request-id": "mine-1"})
        assert given.status_code == status
        assert given.headers.get_list("x-request-id") == ["mine-1"]
        one, other = [await service.http.request(method, path) for _ in range(2)]
        assert one.headers["x-request-id"] != other.headers["x-request-id"]

    @pytest.mark.parametrize("given", [b"a b", b"a" * 129, "é".encode()])
    async def test_has_a_new_id_for_one_that_does_not_fit(
        self, service: Service, given: bytes
    ) -> None:
        response = await service.http.get("/health", headers=[(b"x-request-id", given)])
        assert len(response.headers["x-request-id"]) == 32

    async def test_says_that_there_is_no_such_route(self, service: Service) -> None:
        response = await service.http.get("/nowhere")
        assert (response.status_code, response.json()["error_type"]) == (404, "NotFound")
        response = await service.http.get("/v1/documents")
        assert (response.status_code, response.json()["error_type"]) == (405, "MethodNotAllowed")
        assert response.headers["allow"] == "POST, OPTIONS"

    @pytest.mark.parametrize("path", ["/health", "/info", "/metrics", "/nowhere", "/v1/documents"])
    async def test_to_head_is_that_to_get_without_its_body(
        self, service: Service, path: str
    ) -> None:
        get, head = [await service.http.request(method, path) for method in ("GET", "HEAD")]
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert head.headers["content-type"] == get.headers["content-type"]

    async def test_tells_the_methods_of_a_route(self, service: Service) -> None:
        for path, allow in (("/v1/documents", "POST, OPTIONS"), ("/info", "GET, HEAD, OPTIONS")):
            response = await service.http.options(path)
            assert (response.status_code, response.headers["allow"]) == (204, allow)
            assert not response.content
        assert (await service.http.options("/nowhere")).status_code == 404

    async def test_does_not_mind_a_slash_at_the_end(self, service: Service) -> None:
        response = await service.http.post("/v1/documents/?top_k=1", content="a", headers=PLAIN)
        assert len(response.json()["scores"]) == 1
        assert (await service.http.get("/info/")).status_code == 200
        assert (await service.http.get("/info//")).status_code == 404

    async def test_is_one_line_in_the_log(
        self, service: Service, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="gma")
        answer = await service.classify(TEXT)
        await service.http.post("/v1/documents?topk=1", content=TEXT, headers=PLAIN)
        fine, wrong = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
        assert fine["status"] == 200
        assert (fine["method"], fine["route"]) == ("POST", "/v1/documents")
        assert (fine["bytes"], fine["tokens"]) == (
            answer["usage"]["bytes"],
            answer["usage"]["tokens"],
        )
        assert fine["ms"] > 0
        assert (wrong["status"], wrong["error_type"]) == (422, "Validation")
        assert fine["id"] != wrong["id"]

    async def test_has_an_id_that_a_failed_step_names(
        self, service: Service, caplog: pytest.LogCaptureFixture
    ) -> None:
        service.runner.fails = True
        response = await service.http.post(
            "/v1/documents", content=TEXT, headers={**PLAIN, "x-request-id": "mine-1"}
        )
        assert (response.status_code, response.json()["error_type"]) == (500, "StepFailed")
        lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
        (step,) = [line for line in lines if "a step with" in line["message"]]
        (document,) = step["documents"]
        assert document.startswith("mine-1/")
        assert "the device is on fire" in step["traceback"]
        (failure,) = [line for line in lines if line["message"] == "request failed"]
        assert failure["id"] == "mine-1"


class TestDocs:
    @pytest.fixture
    def service(self, lasting: Service) -> Service:
        return lasting

    async def test_page(self, service: Service) -> None:
        assert (await service.http.get("/", follow_redirects=True)).url.path == "/docs"
        assert (await service.http.get("/docs")).status_code == 200

    async def test_tell_what_a_document_request_may_be(self, service: Service) -> None:
        api = (await service.http.get("/openapi.json")).json()
        post = api["paths"]["/v1/documents"]["post"]
        assert set(post["requestBody"]["content"]) == {"text/plain", "application/json"}
        assert {parameter["name"] for parameter in post["parameters"]} == {
            "model",
            "top_k",
            "evidence",
            "components",
            "max_tokens",
            "x-deadline-ms",
        }
        assert all(parameter["description"] for parameter in post["parameters"])
        answers = post["responses"]
        assert set(answers["200"]["content"]) == {
            "application/json",
            "application/x-ndjson",
            "text/event-stream",
        }
        assert "401" not in answers
        refusals = "400", "404", "405", "408", "413", "414", "415", "422", "429", "431"
        for status in (*refusals, "500", "503", "504"):
            schema = answers[status]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}
