"""Traces: what a collector gets of a request, and that nobody pays without one."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from gma.service.observe import traces
from tests.service.asgi import TEXT, Exchange, Service
from tests.service.collector import Collector, collecting

pytestmark = pytest.mark.anyio

PLAIN = {"content-type": "text/plain"}
ABOVE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
REQUEST, STAGES = "POST /v1/documents", {"receive", "tokenize", "queue", "compute"}
PATIENCE_S = 30


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """One that the service sends to from now on."""
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "books")
        traces.start()
        yield collector
        traces.stop()


def sent(collector: Collector, number: int) -> dict[str, dict[str, Any]]:
    """The next spans; there are so many and no more."""
    traces.flush()
    spans = collector.spans(number, PATIENCE_S)
    assert collector.empty
    return spans


async def test_a_span_a_request_and_one_a_stage(service: Service, collector: Collector) -> None:
    headers = PLAIN | {"traceparent": ABOVE, "x-request-id": "mine"}
    response = await service.http.post("/v1/documents", content=TEXT, headers=headers)
    usage = response.json()["usage"]
    spans = sent(collector, 5)
    request = spans.pop(REQUEST)
    assert (request["service"], request["failed"]) == ("books", False)
    assert [request["trace"], request["parent"]] == ABOVE.split("-")[1:3]
    assert (request["gma.request_id"], request["http.response.status_code"]) == ("mine", 200)
    assert request["http.route"] == "/v1/documents"
    assert {name: request[f"gma.{name}"] for name in usage} == usage
    assert spans.keys() == STAGES
    for stage in spans.values():
        assert (stage["trace"], stage["parent"]) == (request["trace"], request["id"])
        assert request["began"] <= stage["began"] <= stage["ended"] <= request["ended"]
        longest = (stage["ended"] - stage["began"]) / 1e9
        assert 0 <= stage["gma.busy_seconds"] <= longest + 1e-3
    assert spans["receive"]["began"] <= spans["tokenize"]["began"]
    assert spans["tokenize"]["began"] <= spans["queue"]["began"]
    assert spans["queue"]["ended"] == pytest.approx(spans["compute"]["began"], abs=1e3)
    timing = response.json()["timing_ms"]
    for name in ("tokenize", "compute"):
        assert spans[name]["gma.busy_seconds"] == pytest.approx(timing[name] / 1e3, abs=1e-4)
    assert spans["queue"]["gma.busy_seconds"] <= timing["queue"] / 1e3 + 1e-4


async def test_a_document_in_pieces_waits_only_before_its_first_step(
    service: Service, collector: Collector
) -> None:
    async with Exchange(service.app, "/v1/documents", PLAIN) as exchange:
        exchange.send(TEXT.encode())
        await service.runner.step_begun()
        exchange.send(TEXT.encode(), last=True)
        await exchange.finished()
    spans = sent(collector, 5)
    receive, compute = spans["receive"], spans["compute"]
    assert compute["began"] < receive["ended"] <= compute["ended"]
    assert compute["gma.busy_seconds"] < (compute["ended"] - compute["began"]) / 1e9


async def test_a_request_that_is_refused(service: Service, collector: Collector) -> None:
    await service.http.post("/v1/documents", content=b"\xff", headers=PLAIN)
    spans = sent(collector, 2)
    request = spans[REQUEST]
    assert (request["error.type"], request["failed"]) == ("NotUtf8", False)
    assert spans.keys() == {REQUEST, "receive"}


async def test_a_request_that_fails(service: Service, collector: Collector) -> None:
    service.runner.fails = True
    headers = PLAIN | {"accept": "application/x-ndjson"}
    await service.http.post("/v1/documents", content=TEXT, headers=headers)
    spans = sent(collector, 4)
    assert (spans[REQUEST]["error.type"], spans[REQUEST]["failed"]) == ("StepFailed", True)
    assert spans.keys() == {REQUEST, "receive", "tokenize", "queue"}


async def test_the_log_names_the_trace(
    service: Service, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "gma.service.http.middleware"):
        await service.http.get("/info", headers={"traceparent": ABOVE})
    (line,) = (record for record in caplog.records if record.getMessage() == "request")
    assert line.__dict__["fields"]["trace_id"] == ABOVE.split("-")[1]
    assert sent(collector, 1).keys() == {"GET /info"}


async def test_what_is_not_sampled_is_not_sent(
    service: Service, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "gma.service.http.middleware"):
        await service.http.get("/info", headers={"traceparent": ABOVE[:-1] + "0"})
    (line,) = (record for record in caplog.records if record.getMessage() == "request")
    assert "trace_id" not in line.__dict__["fields"]
    sent(collector, 0)


async def test_probes_leave_none(service: Service, collector: Collector) -> None:
    await service.http.get("/health")
    await service.http.get("/metrics")
    sent(collector, 0)


def test_without_an_endpoint_nothing_is_imported() -> None:
    code = """
import sys
from gma.service.http import app as routes
from gma.service.observe import traces
traces.check()
traces.start()
span = traces.Span("x", 0.0, {}, [], False)
print(traces.record(span, {}), any(name.startswith("opentelemetry.sdk") for name in sys.modules))
"""
    environment = {"PATH": "", "OTEL_SERVICE_NAME": "books"}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout.split() == ["None", "False"]


def test_an_endpoint_needs_the_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ValueError, match=rf"{name} is set: install gma-service\[traces\]"):
        traces.check()
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    traces.check()
