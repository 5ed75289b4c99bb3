"""What an engine does, told to Prometheus."""

from __future__ import annotations

from gma.service.engine.observer import Ending, Observer
from gma.service.observe import metrics
from gma.service.observe.memory import Memory


class Meter(Observer):
    """An engine's observer: counts what it is told."""

    def __init__(self) -> None:
        self.memory = Memory(0, 0)
        """The process's memory as it was last looked at."""

        self._largest: dict[tuple[str, str], int] = {}

    def occupancy(self, waiting: int, slots: int, pages: int) -> None:
        metrics.DOCUMENTS_WAITING.set(waiting)
        metrics.SLOTS_IN_USE.set(slots)
        metrics.PAGES_IN_USE.set(pages)

    def refused(self) -> None:
        metrics.REFUSALS.labels("waiting").inc()

    def admitted(self, seconds: float) -> None:
        metrics.SLOT_WAIT_SECONDS.observe(seconds)

    def stepped(self, rows: int, grid_rows: int, tokens: float, seconds: float) -> None:
        metrics.STEP_SECONDS.observe(seconds)
        metrics.STEP_ROWS.inc(rows)
        metrics.STEP_GRID_ROWS.inc(grid_rows)
        metrics.TOKENS.inc(tokens)

    def step_failed(self) -> None:
        metrics.STEP_FAILURES.inc()

    def not_finite(self) -> None:
        metrics.NONFINITE.inc()

    def closed(self, how: Ending, tokens: int) -> None:
        metrics.DOCUMENTS.labels(how).inc()
        if how == "done":
            metrics.DOCUMENT_TOKENS.observe(tokens)
            length = metrics.length_label(tokens)
            self._enlarge(length, "resident", self.memory.resident)
            self._enlarge(length, "device", self.memory.device)

    def _enlarge(self, length: str, memory: str, size: int) -> None:
        """Tell the memory beside a document so long, if it is the largest so far."""
        if size > self._largest.get((length, memory), 0):
            self._largest[length, memory] = size
            metrics.LENGTH_MEMORY_BYTES.labels(length, memory).set(size)
