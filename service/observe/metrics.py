"""What is counted, and how one scrape sees every process of a machine.

prometheus_client's multiprocess mode: each process keeps its numbers in files of a shared folder,
named by PROMETHEUS_MULTIPROC_DIR. The variable has to be set before this module is imported;
without it, metrics are those of this process alone.

Every metric is made by one of three functions here, which also enter it into the catalogue that
docs/metrics.md is written from: `python -m gma.service.observe.metrics > docs/metrics.md`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

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

if TYPE_CHECKING:
    from gma.service.observe.memory import Memory

__all__ = ["CATALOGUE", "CONTENT_TYPE_LATEST", "documentation", "scrape"]

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable that names the shared folder."""

PERIOD_S = 1.0
"""How often what has no event of its own is looked at: memory, and the queue."""

# From a short document on an idle GPU to a long one on a CPU.
LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
LENGTHS = (100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)
"""Tokens of a document, at most, by which what depends on its length is told apart."""

Outcome: TypeAlias = Literal["done", "failed", "aborted"]
Reason: TypeAlias = Literal["draining", "size", "documents", "bytes", "waiting"]
Phase: TypeAlias = Literal["warm-up", "serving"]

Labels: TypeAlias = Mapping[str, str | Sequence[str]]
"""By label its values, or in words what bounds them where they are known only when it runs."""

OUTCOMES: Sequence[Outcome] = ("done", "failed", "aborted")
REASONS: Sequence[Reason] = ("draining", "size", "documents", "bytes", "waiting")
PHASES: Sequence[Phase] = ("warm-up", "serving")
ROLE: Labels = {"role": ("gateway", "worker")}
ROUTE: Labels = {"route": "a route's path, or `other`"}


@dataclass(frozen=True)
class Entry:
    """One metric, as it is documented."""

    name: str
    """As it is scraped: a counter's ends in `_total`."""

    kind: str
    text: str
    labels: Labels
    processes: str
    """How the numbers of a machine's processes are told: added up, or each."""

    buckets: Sequence[float] = ()


CATALOGUE: list[Entry] = []


def _counter(name: str, text: str, labels: Labels | None = None) -> Counter:
    labels = labels or {}
    CATALOGUE.append(Entry(f"{name}_total", "counter", text, labels, "sum"))
    counter = Counter(name, text, list(labels))
    if labels and not any(isinstance(values, str) for values in labels.values()):
        # From 0 on, or the first event is no increase.
        for values in product(*labels.values()):
            counter.labels(*values)
    return counter


def _gauge(
    name: str,
    text: str,
    labels: Labels | None = None,
    mode: Literal["livesum", "liveall", "livemax"] = "livesum",
) -> Gauge:
    labels = labels or {}
    processes = {"livesum": "sum", "liveall": "each, by `pid`", "livemax": "largest"}[mode]
    CATALOGUE.append(Entry(name, "gauge", text, labels, processes))
    return Gauge(name, text, list(labels), multiprocess_mode=mode)


def _histogram(
    name: str, text: str, buckets: Sequence[float], labels: Labels | None = None
) -> Histogram:
    labels = labels or {}
    CATALOGUE.append(Entry(name, "histogram", text, labels, "sum", buckets))
    return Histogram(name, text, list(labels), buckets=buckets)


# A gateway's.
REQUESTS = _counter(
    "gma_requests",
    "Requests answered; status 499 is a client that left.",
    {**ROUTE, "status": "HTTP statuses that the service answers with, and 499"},
)
REQUEST_SECONDS = _histogram(
    "gma_request_seconds",
    "From a request's first byte to its answer's last.",
    LATENCY_BUCKETS,
    ROUTE,
)
ADMISSIONS = _counter(
    "gma_admissions",
    "Documents that gateways took; some are refused yet: they grow too large, or workers are full.",
)
REFUSALS = _counter(
    "gma_refusals",
    "Documents that were refused: draining (503), size (413), and 429 for too many documents or "
    "bytes in flight in a gateway, or too many waiting for a slot of a worker.",
    {"reason": REASONS},
)
DOCUMENTS_IN_FLIGHT = _gauge(
    "gma_documents_in_flight", "Documents that gateways have taken and not answered yet."
)
BYTES_IN_FLIGHT = _gauge(
    "gma_bytes_in_flight", "Bytes of request bodies that gateways have made room for."
)
RECEIVED_BYTES = _counter("gma_received_bytes", "Bytes of documents' request bodies that arrived.")
RECEIVE_SECONDS = _histogram(
    "gma_receive_seconds",
    "From a document's admission to its body's last byte; the stages below go on meanwhile.",
    LATENCY_BUCKETS,
)
DOCUMENT_BYTES = _counter("gma_document_bytes", "Bytes of text in answered documents.")
TOKENIZE_SECONDS = _histogram(
    "gma_tokenize_seconds",
    "Time that went into tokenizing a document that was answered.",
    LATENCY_BUCKETS,
)
QUEUE_SECONDS = _histogram(
    "gma_queue_seconds",
    "Time that an answered document was ready to be read and in no step.",
    LATENCY_BUCKETS,
)
COMPUTE_SECONDS = _histogram(
    "gma_compute_seconds",
    "Time of the steps that read an answered document, beside others.",
    LATENCY_BUCKETS,
)
TOKENIZED_BYTES = _counter("gma_tokenized_bytes", "Bytes of text that were tokenized, as it goes.")
TOKENIZER_SECONDS = _counter(
    "gma_tokenizer_seconds", "Time of threads that tokenized, as it goes: bytes by it are a speed."
)

# A worker's.
WORKERS = _gauge(
    "gma_workers",
    "Workers that are warm, by what they run on.",
    {
        "backend": ("torch", "onnx"),
        "device": "`cpu` or `cuda:N`",
        "dtype": "GMA_DTYPE's values",
    },
)
DOCUMENTS = _counter(
    "gma_documents",
    "Documents that workers closed: done, failed or aborted.",
    {"outcome": OUTCOMES},
)
DOCUMENT_TOKENS = _histogram("gma_document_tokens", "Length of a document that is done.", LENGTHS)
NONFINITE = _counter(
    "gma_nonfinite_documents", "Documents that failed because their scores were no numbers."
)
TOKENS = _counter("gma_tokens", "Tokens read in steps.")
DOCUMENTS_WAITING = _gauge("gma_documents_waiting", "Documents that wait for a slot.")
TOKENS_WAITING = _gauge(
    "gma_tokens_waiting", "Tokens that workers hold and no step has read; told every second."
)
QUEUE_HEAD_SECONDS = _gauge(
    "gma_queue_head_seconds",
    "How long the first document in the queue has waited for a slot, 0 without one; told every "
    "second.",
    mode="livemax",
)
SLOTS = _gauge("gma_slots", "Slots of all workers.")
SLOTS_IN_USE = _gauge("gma_slots_in_use", "Slots that hold a document.")
STATE_BYTES = _gauge(
    "gma_state_bytes",
    "Memory of all slots, and of one more in each worker for the unused rows of steps; it does not "
    "change.",
)
SLOT_WAIT_SECONDS = _histogram(
    "gma_slot_wait_seconds", "Time from a document's first full chunk to its slot.", LATENCY_BUCKETS
)
STEP_SECONDS = _histogram("gma_step_seconds", "Time of one step.", STEP_BUCKETS)
STEP_ROWS = _counter("gma_step_rows", "Rows of steps that held a chunk.")
STEP_GRID_ROWS = _counter("gma_step_grid_rows", "Rows of steps, used or not: the cost of a step.")
STEP_FAILURES = _counter("gma_step_failures", "Steps that failed; their documents were lost.")
COMPILATIONS = _counter(
    "gma_compilations",
    "Graphs that torch.compile made, and kernels that Triton compiled and did not take from its "
    "cache: in the warm-up, or later, which holds up the step that needs them.",
    {"phase": PHASES},
)
LENGTH_MEMORY_BYTES = _gauge(
    "gma_length_memory_bytes",
    "The largest memory that a worker was seen with at the end of a document of at most so many "
    "tokens, more than the next smaller length: equal for all if length costs no memory.",
    {"tokens": (*map(str, LENGTHS), "+Inf"), "memory": ("resident", "device")},
    mode="livemax",
)

# Every process's.
RESIDENT_BYTES = _gauge("gma_resident_memory_bytes", "Physical memory now.", ROLE, "liveall")
RESIDENT_PEAK_BYTES = _gauge(
    "gma_resident_memory_peak_bytes",
    "Physical memory at most since the process started.",
    ROLE,
    "liveall",
)
DEVICE_BYTES = _gauge(
    "gma_device_memory_bytes",
    "GPU memory in use now: what torch allocated; with ONNX Runtime, what the driver tells.",
    ROLE,
    "liveall",
)
DEVICE_PEAK_BYTES = _gauge(
    "gma_device_memory_peak_bytes",
    "GPU memory in use at most since the process started.",
    ROLE,
    "liveall",
)
DEVICE_RESERVED_BYTES = _gauge(
    "gma_device_memory_reserved_bytes",
    "GPU memory that torch holds, in use or not.",
    ROLE,
    "liveall",
)
DEVICE_DRIVER_BYTES = _gauge(
    "gma_device_memory_driver_bytes",
    "GPU memory of the process by NVML, its CUDA context included; of the whole GPU where the "
    "driver can't tell processes apart. Absent without the extra gpu.",
    ROLE,
    "liveall",
)
DEVICE_TOTAL_BYTES = _gauge(
    "gma_device_memory_total_bytes", "Memory of the GPU by NVML.", ROLE, "liveall"
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


async def watch(report: Callable[[], None]) -> None:
    """Report what has no event of its own, for as long as this runs."""
    while True:
        report()
        await asyncio.sleep(PERIOD_S)


def report_memory(role: str, memory: Memory) -> None:
    """What a process has now. A GPU's numbers are left out where there is none to tell them."""
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
    """The value of the label `tokens` for a document so long."""
    return next((str(most) for most in LENGTHS if tokens <= most), "+Inf")


def documentation() -> str:
    """The catalogue in Markdown."""
    return "\n".join([_HEAD, *(_section(entry) for entry in sorted(CATALOGUE, key=_name))])


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


def _section(entry: Entry) -> str:
    facts = [f"- {entry.kind}; processes of a machine: {entry.processes}"]
    for label, values in entry.labels.items():
        told = values if isinstance(values, str) else ", ".join(f"`{value}`" for value in values)
        facts.append(f"- label `{label}`: {told}")
    if entry.buckets:
        facts.append(f"- buckets up to {', '.join(f'{x:.10g}' for x in entry.buckets)}")
    return "\n".join([f"## {entry.name}", "", entry.text, "", *facts, ""])


def _name(entry: Entry) -> str:
    return entry.name


def _forget_dead(directory: Path) -> None:
    """Drop what ended processes last said of the present; what they counted stays."""
    for pid in {file.stem.rpartition("_")[2] for file in directory.glob("gauge_live*.db")}:
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            multiprocess.mark_process_dead(pid, str(directory))  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    sys.stdout.write(documentation())
