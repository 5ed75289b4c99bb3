"""What is counted, and that what is documented is what is counted."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gma.service.engine.step import Batch, Ended, Launched, Outcome
from gma.service.observe import metrics
from gma.service.observe.memory import Memory
from gma.service.runners.compilations import Compilations
from tests.service.asgi import PATIENCE_S, TEXT, Exchange, Service

pytestmark = pytest.mark.anyio

DOCS = Path(__file__).parent.parent.parent / "docs" / "metrics.md"
PATH = "/v1/documents"
ADMITTED = "gma_admissions_total"
PLAIN = {"content-type": "text/plain"}


def test_documentation_is_that_of_the_code() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "gma.service.observe.metrics"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert DOCS.read_text() == told, "python -m gma.service.observe.metrics > docs/metrics.md"


async def test_labels_are_those_that_are_documented(service: Service) -> None:
    await service.classify(TEXT)
    text = (await service.http.get("/metrics")).text
    catalogue = {entry.name: entry for entry in metrics.CATALOGUE}
    # In one process there is also when each began, which is not shared among many.
    ours = [
        family
        for family in text_string_to_metric_families(text)
        if family.name.startswith("gma_") and not family.name.endswith("_created")
    ]
    names = {f.name + "_total" * (f.type == "counter") for f in ours}
    assert names == catalogue.keys()
    for family in ours:
        entry = catalogue[family.name + "_total" * (family.type == "counter")]
        assert (family.type, family.documentation) == (entry.kind, entry.text)
        for sample in family.samples:
            for label in sample.labels.keys() - {"le"}:
                told = entry.labels[label]
                assert isinstance(told, str) or sample.labels[label] in told


async def scraped(service: Service, sample: str) -> float:
    """The value of a sample by its name and labels, as it is written."""
    lines = (await service.http.get("/metrics")).text.splitlines()
    return next(float(x.rpartition(" ")[2]) for x in lines if x.rpartition(" ")[0] == sample)


class TestRefusals:
    """Every one is counted once, by its reason."""

    async def check(self, service: Service, reason: str, status: int) -> None:
        sample = f'gma_refusals_total{{reason="{reason}"}}'
        refused, taken = await scraped(service, sample), await service.metric(ADMITTED)
        response = await service.http.post(PATH, content=TEXT, headers=PLAIN)
        assert response.status_code == status
        assert await scraped(service, sample) == refused + 1
        assert await service.metric(ADMITTED) == taken + (reason == "waiting")

    async def test_of_a_service_that_drains(self, service: Service) -> None:
        await service.gateway.admission.drain()
        await self.check(service, "draining", 503)

    async def test_of_what_is_too_large(self, checkpoint: Path) -> None:
        async with Service(checkpoint, max_document_bytes=10) as service:
            await self.check(service, "size", 413)

    async def test_of_too_many_documents(self, checkpoint: Path) -> None:
        async with Service(checkpoint, max_documents_in_flight=1) as service:
            with service.gateway.admission.admit():
                await self.check(service, "documents", 429)

    async def test_of_too_many_bytes(self, checkpoint: Path) -> None:
        limits = {"max_document_bytes": 1000, "max_bytes_in_flight": 1000}
        async with Service(checkpoint, **limits) as service:
            with service.gateway.admission.admit(990):
                await self.check(service, "bytes", 429)

    async def test_of_too_many_that_wait(self, checkpoint: Path) -> None:
        async with Service(checkpoint, slots=1, max_waiting_documents=0) as service:
            service.runner.go.clear()
            async with Exchange(service.app, PATH, PLAIN) as upload:
                upload.send(TEXT.encode(), last=True)
                await service.runner.step_begun()
                await self.check(service, "waiting", 429)


async def test_bytes_are_counted_where_they_pass(service: Service) -> None:
    names = ("gma_received_bytes_total", "gma_tokenized_bytes_total", "gma_document_bytes_total")
    before = [await service.metric(name) for name in names]
    await service.classify(TEXT)
    size = len(TEXT.encode())
    assert [await service.metric(name) for name in names] == [x + size for x in before]
    assert await service.metric("gma_tokenizer_seconds_total") > 0
    assert await service.metric("gma_receive_seconds_count") > 0


async def test_numbers_that_are_not_finite_are_counted(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = service.runner.step

    def overflow(batch: Batch) -> Launched:
        good = step(batch)
        return Ended(Outcome(good.evidence * float("nan"), good.weight, good.logits))

    monkeypatch.setattr(service.runner, "launch", overflow)
    before = await service.metric("gma_nonfinite_documents_total")
    response = await service.http.post(PATH, content=TEXT, headers=PLAIN)
    assert (response.status_code, response.json()["error_type"]) == (500, "StepFailed")
    assert await service.metric("gma_nonfinite_documents_total") == before + 1


async def test_the_head_of_the_queue_grows_old(checkpoint: Path) -> None:
    async with Service(checkpoint, slots=1) as service:
        await service.until("gma_queue_head_seconds", 0)
        service.runner.go.clear()
        async with (
            asyncio.timeout(PATIENCE_S),
            Exchange(service.app, PATH, PLAIN) as reading,
            Exchange(service.app, PATH, PLAIN) as waiting,
        ):
            for upload in (reading, waiting):
                upload.send(TEXT.encode(), last=True)
            await service.runner.step_begun()
            while not await service.metric("gma_queue_head_seconds"):
                pass
            assert await service.metric("gma_tokens_waiting") > 0
            assert await service.metric("gma_documents_waiting") == 1
            service.runner.go.set()
            for upload in (reading, waiting):
                assert (await upload.head())[0] == 200


async def test_state_and_memory_by_length(service: Service) -> None:
    pool = service.runner.pool
    assert await scraped(service, 'gma_state_bytes{model="tiny"}') == sum(
        tensor.nbytes for _, tensor in pool.states.tensors()
    )
    sample = 'gma_length_memory_bytes{memory="resident",model="tiny",tokens="1000"}'
    await service.until("gma_queue_head_seconds", 0)  # memory was looked at
    await service.classify(TEXT)
    peak = await scraped(service, 'gma_resident_memory_peak_bytes{role="worker"}')
    assert 0 < await scraped(service, sample) <= peak


@pytest.mark.parametrize(
    ("tokens", "label"), [(1, "100"), (100, "100"), (101, "1000"), (10**8, "+Inf")]
)
def test_lengths_are_few(tokens: int, label: str) -> None:
    assert metrics.length_label(tokens) == label


async def test_a_gpu_is_told_only_where_there_is_one(service: Service) -> None:
    name = 'gma_device_memory_driver_bytes{role="gateway"}'
    assert name not in (await service.http.get("/metrics")).text
    metrics.report_memory("gateway", Memory(1, 2, 3, 4, 5, 6, 7))
    try:
        assert await scraped(service, name) == 6
        reserved = 'gma_device_memory_reserved_bytes{role="gateway"}'
        assert await scraped(service, reserved) == 5
    finally:
        for gauge in (
            metrics.DEVICE_BYTES,
            metrics.DEVICE_PEAK_BYTES,
            metrics.DEVICE_RESERVED_BYTES,
            metrics.DEVICE_DRIVER_BYTES,
            metrics.DEVICE_TOTAL_BYTES,
        ):
            gauge.clear()


def test_compilations_are_counted_and_what_a_cache_had_is_not() -> None:
    knobs = pytest.importorskip("triton.knobs")
    before = knobs.compilation.listener
    compilations = Compilations()
    try:
        for hit in (False, True, False):
            knobs.compilation.listener(
                src=None, metadata={}, metadata_group={}, times=None, cache_hit=hit
            )
        assert (compilations.new(), compilations.new()) == (2, 0)
    finally:
        knobs.compilation.listener = before
