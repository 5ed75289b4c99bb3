"""The Grafana dashboards: `python deploy/monitoring/dashboards.py` writes them beside this file.

A panel is a title, a unit and its expressions by legend; where it stands follows from its place.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gma.service.observe import metrics

COLUMNS, WIDTH, HEIGHT = 3, 8, 7  # of Grafana's grid, which is 24 wide

# What is chosen above the panels. Of namespaces one, for nothing is summed over several; on a
# machine without Kubernetes there is none, and series have none.
CHOICES = {"namespace": False, "job": True, "pod": True, "model": True}
"""Labels by name, and whether all of their values may be chosen together."""

OF_MODELS = {entry.name for entry in metrics.CATALOGUE if "model" in entry.labels}
"""Metrics of which a model may be chosen; the others are of all."""

SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """Lines over time."""

    title: str
    unit: str
    """Grafana's name for it: s, bytes, Bps, short, percentunit."""

    lines: Mapping[str, str]
    """Expressions by legend; `{{label}}` in a legend is the series' own."""

    gpu: bool = False
    """It has nothing to show where there is no GPU."""

    text: str = ""


def rate(metric: str, by: str = "") -> str:
    """A counter's increase a second, of all machines that are chosen."""
    return f"sum{by and f' by ({by})'}(rate({metric}[$__rate_interval]))"


def quantiles(histogram: str) -> dict[str, str]:
    """Half, 95% and 99% of what a histogram saw took no longer."""
    buckets = f"sum by (le) (rate({histogram}_bucket[$__rate_interval]))"
    return {
        name: f"histogram_quantile({q}, {buckets})"
        for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
    }


DOCUMENTS = '{route="/v1/documents"}'
TOKENIZER_TIME = rate("gma_tokenizer_seconds_total")
DOCUMENT_BUCKETS = 'gma_request_seconds_bucket{route="/v1/documents"}'

SERVICE = (
    Panel(
        "Requests by status",
        "reqps",
        {"{{status}}": rate(f"gma_requests_total{DOCUMENTS}", "status")},
    ),
    Panel(
        "Time of a request",
        "s",
        {
            name: expression.replace("gma_request_seconds_bucket", DOCUMENT_BUCKETS)
            for name, expression in quantiles("gma_request_seconds").items()
        },
    ),
    Panel(
        "Mean time of a document by stage",
        "s",
        {
            name: f"{rate(f'gma_{metric}_seconds_sum')} / {rate(f'gma_{metric}_seconds_count')}"
            for name, metric in (
                ("receive", "receive"),
                ("tokenize", "tokenize"),
                ("slot", "slot_wait"),
                ("queue", "queue"),
                ("compute", "compute"),
            )
        },
        text="Stages overlap: a document is read while it arrives.",
    ),
    Panel("Tokens read", "short", {"tokens/s": rate("gma_tokens_total")}),
    Panel(
        "Bytes",
        "Bps",
        {
            "received": rate("gma_received_bytes_total"),
            "tokenized": rate("gma_tokenized_bytes_total"),
            "answered": rate("gma_document_bytes_total"),
        },
    ),
    Panel(
        "Documents closed by outcome",
        "ops",
        {"{{outcome}}": rate("gma_documents_total", "outcome")},
    ),
    Panel("Length of documents in tokens", "short", quantiles("gma_document_tokens")),
    Panel(
        "Admissions, and refusals by reason",
        "ops",
        {
            "admitted": rate("gma_admissions_total"),
            "{{reason}}": rate("gma_refusals_total", "reason"),
        },
    ),
    Panel(
        "Documents in flight",
        "short",
        {
            "in gateways": "sum(gma_documents_in_flight)",
            "waiting for a slot": "sum(gma_documents_waiting)",
        },
    ),
    Panel("Slots in use", "percentunit", {"in use": "sum(gma_slots_in_use) / sum(gma_slots)"}),
    Panel("Age of the queue's head", "s", {"oldest": "max(gma_queue_head_seconds)"}),
    Panel("Tokens waiting in workers", "short", {"waiting": "sum(gma_tokens_waiting)"}),
    Panel("Time of a step", "s", quantiles("gma_step_seconds")),
    Panel(
        "Use of a step",
        "percentunit",
        {
            "rows filled": f"{rate('gma_step_rows_total')} / {rate('gma_step_grid_rows_total')}",
            "workers in a step": f"{rate('gma_step_seconds_sum')} / sum(gma_workers)",
        },
    ),
    Panel(
        "Tokenizer",
        "Bps",
        {"a thread": f"{rate('gma_tokenized_bytes_total')} / {TOKENIZER_TIME}"},
    ),
    Panel(
        "Failures",
        "ops",
        {
            "steps": rate("gma_step_failures_total"),
            "not finite": rate("gma_nonfinite_documents_total"),
        },
    ),
    Panel("Compilations", "short", {"{{phase}}": "sum by (phase) (gma_compilations_total)"}),
    Panel(
        "Warm workers",
        "short",
        {
            "{{model}} {{backend}} {{device}} {{dtype}}": (
                "sum by (model, backend, device, dtype) (gma_workers)"
            )
        },
    ),
)

MEMORY = (
    Panel(
        "Physical memory by role",
        "bytes",
        {"{{role}} {{pod}} {{pid}}": "gma_resident_memory_bytes"},
    ),
    Panel("Peak of it", "bytes", {"{{role}} {{pod}} {{pid}}": "gma_resident_memory_peak_bytes"}),
    Panel(
        "Memory against length",
        "bytes",
        {"{{memory}} up to {{tokens}}": "max by (memory, tokens) (gma_length_memory_bytes)"},
        text="By the tokens of the document: one height if its length costs no memory.",
    ),
    Panel("Bytes of bodies in flight", "bytes", {"in flight": "sum(gma_bytes_in_flight)"}),
    Panel("Memory of all slots", "bytes", {"states": "sum(gma_state_bytes)"}),
    Panel(
        "Memory of a slot",
        "bytes",
        {"a slot": "sum(gma_state_bytes) / (sum(gma_slots) + sum(gma_workers))"},
    ),
    Panel(
        "GPU memory by torch",
        "bytes",
        {
            "allocated {{pod}} {{pid}}": "gma_device_memory_bytes",
            "reserved {{pod}} {{pid}}": "gma_device_memory_reserved_bytes",
            "peak {{pod}} {{pid}}": "gma_device_memory_peak_bytes",
        },
        gpu=True,
    ),
    Panel(
        "GPU memory by NVML",
        "bytes",
        {
            "process {{pod}} {{pid}}": "gma_device_memory_driver_bytes",
            "the GPU's {{pod}} {{pid}}": "gma_device_memory_total_bytes",
        },
        gpu=True,
    ),
    Panel(
        "GPU memory in use",
        "percentunit",
        {"{{pod}} {{pid}}": "gma_device_memory_driver_bytes / gma_device_memory_total_bytes"},
        gpu=True,
    ),
)

DASHBOARDS = {"service": ("GMA: service", SERVICE), "memory": ("GMA: GPU and memory", MEMORY)}


def dashboard(name: str) -> dict[str, Any]:
    """One of `DASHBOARDS` in Grafana's own model."""
    title, panels = DASHBOARDS[name]
    return {
        "uid": f"gma-{name}",
        "title": title,
        "tags": ["gma"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "label": "Prometheus",
                    "type": "datasource",
                    "query": "prometheus",
                },
                *(_choice(name, all_of_them) for name, all_of_them in CHOICES.items()),
            ]
        },
        "panels": [_panel(index, panel) for index, panel in enumerate(panels)],
    }


def _choice(name: str, all_of_them: bool) -> dict[str, Any]:
    metric = "gma_workers" if name == "model" else "gma_resident_memory_bytes"
    metric += '{namespace=~"$namespace"}' * (name != "namespace")
    return {
        "name": name,
        "type": "query",
        "datasource": SOURCE,
        "query": f"label_values({metric}, {name})",
        "refresh": 2,  # with the time range
        "sort": 1,
        "includeAll": all_of_them,
        **({"allValue": ".*"} if all_of_them else {}),
    }


def chosen(expression: str) -> str:
    """An expression of those of our series alone that are chosen above the panels."""

    def with_choices(metric: re.Match[str]) -> str:
        name = re.sub("_(bucket|sum|count)$", "", metric[1])
        labels = [label for label in CHOICES if label != "model" or name in OF_MODELS]
        chosen = ",".join(f'{label}=~"${label}"' for label in labels)
        return f"{metric[1]}{{{chosen}" + (",", "}")[metric[2] is None]

    return re.sub(r"\b(gma_\w+)(\{)?", with_choices, expression)


def _panel(index: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(index, COLUMNS)
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": " ".join(
            filter(None, [panel.text, panel.gpu * "Empty where there is no GPU."])
        ),
        "datasource": SOURCE,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "expr": chosen(expression),
                "legendFormat": legend,
                "datasource": SOURCE,
            }
            for i, (legend, expression) in enumerate(panel.lines.items())
        ],
    }


def main(arguments: Sequence[str]) -> None:
    """Write every dashboard into a folder, by default this one."""
    folder = Path(arguments[0]) if arguments else Path(__file__).parent
    for name in DASHBOARDS:
        text = json.dumps(dashboard(name), indent=2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
