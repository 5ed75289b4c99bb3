"""What is counted, and how one scrape sees every process of a machine.

prometheus_client's multiprocess mode: each process keeps its numbers in files of a shared folder,
named by PROMETHEUS_MULTIPROC_DIR. The variable has to be set before this module is imported;
without it, metrics are those of this process alone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

__all__ = ["CONTENT_TYPE_LATEST", "scrape"]

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable that names the shared folder."""

MEMORY_PERIOD_S = 5.0

# From a short document on an idle GPU to a long one on a CPU.
LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

# The gateway's.
REQUESTS = Counter(
    "gma_requests", "Requests answered; status 499 is a client that left.", ["route", "status"]
)
REQUEST_SECONDS = Histogram(
    "gma_request_seconds",
    "From a request's first byte to its answer's last.",
    ["route"],
    buckets=LATENCY_BUCKETS,
)
DOCUMENTS_IN_FLIGHT = Gauge(
    "gma_documents_in_flight",
    "Documents that gateways have taken and not answered yet.",
    multiprocess_mode="livesum",
)
BYTES_IN_FLIGHT = Gauge(
    "gma_bytes_in_flight",
    "Bytes of request bodies that gateways have made room for.",
    multiprocess_mode="livesum",
)
DOCUMENT_BYTES = Counter("gma_document_bytes", "Bytes of text in answered documents.")
TOKENIZE_SECONDS = Histogram(
    "gma_tokenize_seconds", "Time that went into tokenizing a document.", buckets=LATENCY_BUCKETS
)
QUEUE_SECONDS = Histogram(
    "gma_queue_seconds",
    "Time that a document was ready to be read and in no step.",
    buckets=LATENCY_BUCKETS,
)
COMPUTE_SECONDS = Histogram(
    "gma_compute_seconds",
    "Time of the steps that read a document, beside others.",
    buckets=LATENCY_BUCKETS,
)

# The worker's.
DOCUMENTS = Counter(
    "gma_documents", "Documents that workers closed: done, failed or aborted.", ["outcome"]
)
TOKENS = Counter("gma_tokens", "Tokens read in steps.")
DOCUMENTS_WAITING = Gauge(
    "gma_documents_waiting", "Documents that wait for a slot.", multiprocess_mode="livesum"
)
SLOTS = Gauge("gma_slots", "Slots of all workers.", multiprocess_mode="livesum")
SLOTS_IN_USE = Gauge("gma_slots_in_use", "Slots that hold a document.", multiprocess_mode="livesum")
SLOT_WAIT_SECONDS = Histogram(
    "gma_slot_wait_seconds",
    "Time from a document's first full chunk to its slot.",
    buckets=LATENCY_BUCKETS,
)
STEP_SECONDS = Histogram("gma_step_seconds", "Time of one step.", buckets=STEP_BUCKETS)
STEP_ROWS = Counter("gma_step_rows", "Rows of steps that held a chunk.")
STEP_GRID_ROWS = Counter("gma_step_grid_rows", "Rows of steps, used or not: the cost of a step.")
STEP_FAILURES = Counter("gma_step_failures", "Steps that failed; their documents were lost.")

# Every process's.
RESIDENT_BYTES = Gauge(
    "gma_resident_memory_bytes", "Physical memory now.", ["role"], multiprocess_mode="liveall"
)
RESIDENT_PEAK_BYTES = Gauge(
    "gma_resident_memory_peak_bytes",
    "Physical memory at most since the process started.",
    ["role"],
    multiprocess_mode="liveall",
)
DEVICE_BYTES = Gauge(
    "gma_device_memory_bytes", "GPU memory in use now.", ["role"], multiprocess_mode="liveall"
)
DEVICE_PEAK_BYTES = Gauge(
    "gma_device_memory_peak_bytes",
    "GPU memory in use at most since the process started.",
    ["role"],
    multiprocess_mode="liveall",
)


def scrape() -> bytes:
    """All metrics as Prometheus text: of every process on this machine, or of this one."""
    directory = os.environ.get(DIRECTORY)
    if directory is None:
        return generate_latest(REGISTRY)
    _forget_dead(Path(directory))
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, directory)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


async def watch_memory(role: str, memory: Callable[[], tuple[int, int, int, int]]) -> None:
    """Report memory for as long as this runs: bytes resident now and at most, then the device's."""
    gauges = (RESIDENT_BYTES, RESIDENT_PEAK_BYTES, DEVICE_BYTES, DEVICE_PEAK_BYTES)
    while True:
        for gauge, value in zip(gauges, memory(), strict=True):
            gauge.labels(role).set(value)
        await asyncio.sleep(MEMORY_PERIOD_S)


def _forget_dead(directory: Path) -> None:
    """Drop what ended processes last said of the present; what they counted stays."""
    for pid in {file.stem.rpartition("_")[2] for file in directory.glob("gauge_live*.db")}:
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            multiprocess.mark_process_dead(pid, str(directory))  # type: ignore[no-untyped-call]
