"""What is counted, and how one scrape sees every process of a machine.

prometheus_client's multiprocess mode: each process keeps its numbers in files of a shared folder
(`gma.service.observe.sharing`), which it has to join before this module is imported; without it,
metrics are those of this process alone.

docs/metrics.md is written from the catalogue that makes them:
`python -m gma.service.observe.metrics > docs/metrics.md`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    generate_latest,
    multiprocess,
)

from gma.service.observe import sharing
from gma.service.observe.catalogue import Catalogue, Labels

if TYPE_CHECKING:
    from gma.service.observe.memory import Memory

__all__ = ["CATALOGUE", "CONTENT_TYPE_LATEST", "documentation", "scrape"]

PERIOD_S = 1.0
"""How often what has no event of its own is looked at: memory, and the queue."""

# From a short document on an idle GPU to a long one on a CPU.
LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
SCORE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
LENGTHS = (100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)
"""Tokens of a document, at most, by which what depends on its length is told apart."""

READS = ("taken", "refused")
OUTCOMES = ("done", "failed", "aborted")
REASONS = (
    "draining",
    "size",
    "documents",
    "bytes",
    "key",
    "address",
    "slow",
    "waiting",
    "deadline",
    "allowance",
)
SESSION_EVENTS = ("created", "resumed", "forked", "appended", "deleted", "expired")
PHASES = ("warm-up", "serving")
ROLE: Labels = {"role": ("gateway", "worker")}
ROUTE: Labels = {"route": "a route's path, without a model in front, or `other`"}
MODEL: Labels = {"model": "names of the models that are served"}

CATALOGUE = Catalogue()

# What gateways tell.
REQUESTS = CATALOGUE.counter(
    "gma_requests",
    "Requests that were answered; status 499 stands for a client that left first.",
    {**ROUTE, "status": "HTTP statuses that the service answers with, and 499"},
)
REQUEST_SECONDS = CATALOGUE.histogram(
    "gma_request_seconds",
    "Time from a request's first byte to its answer's last.",
    LATENCY_BUCKETS,
    ROUTE,
)
KEYS_READS = CATALOGUE.counter(
    "gma_keys_reads",
    "Times that a gateway read the file of API keys because it had changed; `refused`: it could "
    "not be used, and the old keys stay.",
    {"result": READS},
)
MODEL_CHANGES = CATALOGUE.counter(
    "gma_model_changes",
    "Times that `gma serve` found the file of models, or a checkpoint that it names, to have "
    "changed; `refused`: it could not be used, and what there was stays.",
    {"result": READS},
)
ADMISSIONS = CATALOGUE.counter(
    "gma_admissions",
    "Documents that gateways took, with those that were refused later: they grew too large, or no "
    "worker had room.",
)
BATCH_LINES = CATALOGUE.counter(
    "gma_batch_lines",
    "Lines of batches that were answered, by the status that each would have by itself; the batch "
    "is one request.",
    {"status": "200, and those of errors"},
)
REFUSALS = CATALOGUE.counter(
    "gma_refusals",
    "Documents that were refused: with 503 while draining, with 413 for their size, and with 429 "
    "for too many documents or bytes in flight in a gateway, also of one key or address, or too "
    "many that wait for a slot of a worker, or a key whose allowance is spent; with 408 those that "
    "came slowly when too many did; with 504 those whose deadline was too soon for their size.",
    {"reason": REASONS},
)
KEY_REFUSALS = CATALOGUE.counter(
    "gma_key_refusals",
    "Documents that were refused with 429 because their API key's allowance was spent.",
    {
        "key": "names of the keys in the file of API keys",
        "limit": "`documents_per_minute` or `bytes_per_day`",
    },
)
DOCUMENTS_IN_FLIGHT = CATALOGUE.gauge(
    "gma_documents_in_flight", "Documents that gateways have taken and not answered yet."
)
BYTES_IN_FLIGHT = CATALOGUE.gauge(
    "gma_bytes_in_flight", "Bytes of request bodies that gateways have made room for."
)
RECEIVED_BYTES = CATALOGUE.counter(
    "gma_received_bytes", "Bytes of documents' request bodies, counted as they arrive."
)
RECEIVE_SECONDS = CATALOGUE.histogram(
    "gma_receive_seconds",
    "Time from a document's admission to its body's last byte; it is tokenized and computed "
    "meanwhile.",
    LATENCY_BUCKETS,
)
PREDICTION_SCORE = CATALOGUE.histogram(
    "gma_prediction_score",
    "Scores of the labels that answers said, so that its count is how often each was said; under "
    "`(none)`, where nothing reached its threshold, the best label's score.",
    SCORE_BUCKETS,
    {
        **MODEL,
        "label": "the model's first 100 labels, `(other)` for the rest of them, and `(none)`",
    },
)
DOCUMENTS_MOVED = CATALOGUE.counter(
    "gma_documents_moved", "Documents that went on at another worker when theirs was lost."
)
DOCUMENT_BYTES = CATALOGUE.counter(
    "gma_document_bytes", "Bytes of text in answered documents.", MODEL
)
TOKENIZE_SECONDS = CATALOGUE.histogram(
    "gma_tokenize_seconds",
    "Time that was spent on tokenizing an answered document.",
    LATENCY_BUCKETS,
    MODEL,
)
QUEUE_SECONDS = CATALOGUE.histogram(
    "gma_queue_seconds",
    "Time that an answered document was ready to be read, and in no step.",
    LATENCY_BUCKETS,
    MODEL,
)
COMPUTE_SECONDS = CATALOGUE.histogram(
    "gma_compute_seconds",
    "Time of the steps that read an answered document; they read others too.",
    LATENCY_BUCKETS,
    MODEL,
)
TOKENIZED_BYTES = CATALOGUE.counter(
    "gma_tokenized_bytes", "Bytes of text, counted as they are tokenized.", MODEL
)
TOKENIZER_SECONDS = CATALOGUE.counter(
    "gma_tokenizer_seconds",
    "Time that threads spend on tokenizing, counted as it passes: gma_tokenized_bytes_total by it "
    "is their speed.",
    MODEL,
)

SESSIONS = CATALOGUE.counter(
    "gma_sessions",
    "What was done with sessions; `expired`: one was asked for after its time.",
    {"event": SESSION_EVENTS},
)
SESSION_STORE_SECONDS = CATALOGUE.histogram(
    "gma_session_store_seconds",
    "Time that the store of sessions took.",
    STEP_BUCKETS,
    {"operation": ("create", "read", "replace", "delete")},
)

# What workers tell.
WORKERS = CATALOGUE.gauge(
    "gma_workers",
    "Workers that are warm, by what they run on.",
    {
        **MODEL,
        "backend": ("torch", "onnx"),
        "device": "`cpu` or `cuda:N`",
        "dtype": "GMA_DTYPE's values",
    },
)
DOCUMENTS = CATALOGUE.counter(
    "gma_documents",
    "Documents that workers closed: done, failed or aborted.",
    {**MODEL, "outcome": OUTCOMES},
)
DOCUMENT_TOKENS = CATALOGUE.histogram(
    "gma_document_tokens", "Length of a document that is done.", LENGTHS, MODEL
)
NONFINITE = CATALOGUE.counter(
    "gma_nonfinite_documents", "Documents that failed because their scores were not finite.", MODEL
)
TOKENS = CATALOGUE.counter("gma_tokens", "Tokens read in steps.", MODEL)
DOCUMENTS_WAITING = CATALOGUE.gauge(
    "gma_documents_waiting", "Documents that wait for a slot.", MODEL
)
TOKENS_WAITING = CATALOGUE.gauge(
    "gma_tokens_waiting",
    "Tokens that workers hold and have in no step yet, of a document that is kept whole at most "
    "`GMA_INBOX_TOKENS`; looked at every second.",
    MODEL,
)
QUEUE_HEAD_SECONDS = CATALOGUE.gauge(
    "gma_queue_head_seconds",
    "How long the document that is next to get a slot has waited for it, 0 if none waits; looked "
    "at every second.",
    MODEL,
    mode="livemax",
)
SLOTS = CATALOGUE.gauge("gma_slots", "Slots of all workers.", MODEL)
SLOTS_IN_USE = CATALOGUE.gauge("gma_slots_in_use", "Slots that hold a document.", MODEL)
PAGES = CATALOGUE.gauge(
    "gma_pages",
    "Pages of all workers, each for a chunk of a document that is kept whole; 0 with a causal "
    "model.",
    MODEL,
)
PAGES_IN_USE = CATALOGUE.gauge("gma_pages_in_use", "Pages that a document holds.", MODEL)
STATE_BYTES = CATALOGUE.gauge(
    "gma_state_bytes",
    "Memory of all slots, and of one more in each worker for the unused rows of steps; it never "
    "changes.",
    MODEL,
)
SLOT_WAIT_SECONDS = CATALOGUE.histogram(
    "gma_slot_wait_seconds",
    "Time from a document's first full chunk to its slot.",
    LATENCY_BUCKETS,
    MODEL,
)
STEP_SECONDS = CATALOGUE.histogram("gma_step_seconds", "Time of one step.", STEP_BUCKETS, MODEL)
STEP_ROWS = CATALOGUE.counter("gma_step_rows", "Rows of steps that held a chunk.", MODEL)
STEP_GRID_ROWS = CATALOGUE.counter(
    "gma_step_grid_rows", "Rows of steps, whether they held a chunk or not: what steps cost.", MODEL
)
STEP_FAILURES = CATALOGUE.counter(
    "gma_step_failures", "Steps that failed; their documents were lost.", MODEL
)
COMPILATIONS = CATALOGUE.counter(
    "gma_compilations",
    "Graphs that torch.compile made, and kernels that Triton compiled because its cache had none: "
    "in the warm-up, or later, which holds up the step that needs them.",
    {"phase": PHASES},
)
LENGTH_MEMORY_BYTES = CATALOGUE.gauge(
    "gma_length_memory_bytes",
    "The most memory that a worker had at the end of a document of at most `tokens` tokens, and of "
    "more than the next smaller label says: the same for all if length costs no memory.",
    {**MODEL, "tokens": (*map(str, LENGTHS), "+Inf"), "memory": ("resident", "device")},
    mode="livemax",
)

# What both tell.
RESIDENT_BYTES = CATALOGUE.gauge(
    "gma_resident_memory_bytes", "Physical memory now.", ROLE, "liveall"
)
RESIDENT_PEAK_BYTES = CATALOGUE.gauge(
    "gma_resident_memory_peak_bytes",
    "Most physical memory since the process started.",
    ROLE,
    "liveall",
)
DEVICE_BYTES = CATALOGUE.gauge(
    "gma_device_memory_bytes",
    "GPU memory in use now: what torch has allocated; with ONNX Runtime, what the driver tells.",
    ROLE,
    "liveall",
)
DEVICE_PEAK_BYTES = CATALOGUE.gauge(
    "gma_device_memory_peak_bytes",
    "Most GPU memory in use since the process started.",
    ROLE,
    "liveall",
)
DEVICE_RESERVED_BYTES = CATALOGUE.gauge(
    "gma_device_memory_reserved_bytes",
    "GPU memory that torch holds, in use or not.",
    ROLE,
    "liveall",
)
DEVICE_DRIVER_BYTES = CATALOGUE.gauge(
    "gma_device_memory_driver_bytes",
    "GPU memory of the process as NVML tells it, with its CUDA context; of the whole GPU where the "
    "driver can't tell processes apart. Absent without the extra gpu.",
    ROLE,
    "liveall",
)
DEVICE_TOTAL_BYTES = CATALOGUE.gauge(
    "gma_device_memory_total_bytes", "Memory that the GPU has, as NVML tells it.", ROLE, "liveall"
)


def scrape() -> bytes:
    """All metrics as Prometheus text: of every process on this machine, or of this one."""
    directory = os.environ.get(sharing.DIRECTORY)
    if directory is None:
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, directory)  # type: ignore[no-untyped-call]
    with sharing.alone(Path(directory)):
        sharing.add_ended(Path(directory))
        return generate_latest(registry)


async def watch(report: Callable[[], None]) -> None:
    """Call `report`, for what has no event of its own, every PERIOD_S for as long as this runs."""
    while True:
        report()
        await asyncio.sleep(PERIOD_S)


def report_memory(role: str, memory: Memory) -> None:
    """Set the metrics of a process's memory. A GPU's are left out where there is none to tell."""
    RESIDENT_BYTES.labels(role).set(memory.resident)
    RESIDENT_PEAK_BYTES.labels(role).set(memory.resident_peak)
    for gauge, value in (
        (DEVICE_BYTES, memory.device),
        (DEVICE_PEAK_BYTES, memory.device_peak),
        (DEVICE_RESERVED_BYTES, memory.device_reserved),
        (DEVICE_DRIVER_BYTES, memory.device_driver),
        (DEVICE_TOTAL_BYTES, memory.device_total),
    ):
        if value:
            gauge.labels(role).set(value)


def length_label(tokens: int) -> str:
    """The value of the label `tokens` for a document with so many."""
    return next((str(most) for most in LENGTHS if tokens <= most), "+Inf")


def documentation() -> str:
    """The catalogue in Markdown."""
    return f"{_HEAD}\n{CATALOGUE.markdown()}"


_HEAD = """\
# Metrics

<!-- Written by `python -m gma.service.observe.metrics > docs/metrics.md` from that module. -->

`GET /metrics` answers in Prometheus' text format, with the numbers of every process on the machine:
any gateway tells them all, so one scrape of each machine is enough, and two would count twice.
Counts stay when a process ends; what it said of the present goes. A histogram `x` is scraped as
`x_bucket` (label `le`), `x_sum` and `x_count`. The labels' values below are all there are.

The words are those of [architecture.md](architecture.md). Dashboards and alerts that use these
metrics are in `deploy/monitoring`; [runbook.md](runbook.md) says what to do when one fires.
"""


if __name__ == "__main__":
    sys.stdout.write(documentation())
