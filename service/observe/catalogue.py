"""A catalogue of metrics: each is made and documented at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeAlias

from prometheus_client import Counter, Gauge, Histogram

Labels: TypeAlias = Mapping[str, str | Sequence[str]]
"""By label its values, or in words what bounds them where they are known only when it runs."""

Mode: TypeAlias = Literal["livesum", "liveall", "livemax"]

PROCESSES: Mapping[Mode, str] = {
    "livesum": "sum",
    "liveall": "each, by `pid`",
    "livemax": "largest",
}


@dataclass(frozen=True)
class Entry:
    """One metric, as it is documented."""

    name: str
    """As it is scraped: a counter's ends in `_total`."""

    kind: str
    text: str
    labels: Labels
    processes: str
    """How the numbers of a machine's processes are told: added up, each, or the largest."""

    buckets: Sequence[float] = ()

    def markdown(self) -> str:
        """The metric's section of a page."""
        facts = [f"- {self.kind}; processes of a machine: {self.processes}"]
        for label, values in self.labels.items():
            told = values if isinstance(values, str) else ", ".join(map("`{}`".format, values))
            facts.append(f"- label `{label}`: {told}")
        if self.buckets:
            facts.append(f"- buckets up to {', '.join(f'{x:.10g}' for x in self.buckets)}")
        return "\n".join([f"## {self.name}", "", self.text, "", *facts, ""])


class Catalogue:
    """Makes metrics, and lists those that it made."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def counter(self, name: str, text: str, labels: Labels | None = None) -> Counter:
        """A count of what happened in all processes; the name is without `_total`."""
        labels = labels or {}
        self._entries.append(Entry(f"{name}_total", "counter", text, labels, "sum"))
        counter = Counter(name, text, list(labels))
        if labels and not any(isinstance(values, str) for values in labels.values()):
            # From 0 on, or the first event is no increase.
            for values in product(*labels.values()):
                counter.labels(*values)
        return counter

    def gauge(
        self, name: str, text: str, labels: Labels | None = None, mode: Mode = "livesum"
    ) -> Gauge:
        """What is so at present in the processes that live; `mode` says how they go together."""
        labels = labels or {}
        self._entries.append(Entry(name, "gauge", text, labels, PROCESSES[mode]))
        return Gauge(name, text, list(labels), multiprocess_mode=mode)

    def histogram(
        self, name: str, text: str, buckets: Sequence[float], labels: Labels | None = None
    ) -> Histogram:
        """How often values in all processes were at most each of `buckets`."""
        labels = labels or {}
        self._entries.append(Entry(name, "histogram", text, labels, "sum", buckets))
        return Histogram(name, text, list(labels), buckets=buckets)

    def markdown(self) -> str:
        """A section for each metric, by name."""
        return "\n".join(
            entry.markdown() for entry in sorted(self._entries, key=lambda entry: entry.name)
        )
