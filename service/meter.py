"""What an engine does, told to Prometheus."""

from __future__ import annotations

from typing import get_args

from gma.service.engine.observer import Ending, Observer
from gma.service.observe import metrics
from gma.service.observe.memory import Memory


class Meter(Observer):
    """An engine's observer: counts what it is told."""

    def __init__(self, model: str) -> None:
        """`model`: the name of that which the engine runs."""
        self.memory = Memory(0, 0)
        """The process's memory as it was last looked at."""

        self._model = model
        self._largest: dict[tuple[str, str], int] = {}
        # Made at once: from 0 on, or the first event is no increase.
        self._documents_waiting = metrics.DOCUMENTS_WAITING.labels(model)
        self._slots_in_use = metrics.SLOTS_IN_USE.labels(model)
        self._pages_in_use = metrics.PAGES_IN_USE.labels(model)
        self._slot_wait_seconds = metrics.SLOT_WAIT_SECONDS.labels(model)
        self._step_seconds = metrics.STEP_SECONDS.labels(model)
        self._step_rows = metrics.STEP_ROWS.labels(model)
        self._step_grid_rows = metrics.STEP_GRID_ROWS.labels(model)
        self._tokens = metrics.TOKENS.labels(model)
        self._step_failures = metrics.STEP_FAILURES.labels(model)
        self._nonfinite = metrics.NONFINITE.labels(model)
        self._documents = {how: metrics.DOCUMENTS.labels(model, how) for how in get_args(Ending)}
        self._document_tokens = metrics.DOCUMENT_TOKENS.labels(model)

    def occupancy(self, waiting: int, slots: int, pages: int) -> None:
        self._documents_waiting.set(waiting)
        self._slots_in_use.set(slots)
        self._pages_in_use.set(pages)

    def refused(self) -> None:
        metrics.REFUSALS.labels("waiting").inc()

    def admitted(self, seconds: float) -> None:
        self._slot_wait_seconds.observe(seconds)

    def stepped(self, rows: int, grid_rows: int, tokens: float, seconds: float) -> None:
        self._step_seconds.observe(seconds)
        self._step_rows.inc(rows)
        self._step_grid_rows.inc(grid_rows)
        self._tokens.inc(tokens)

    def step_failed(self) -> None:
        self._step_failures.inc()

    def not_finite(self) -> None:
        self._nonfinite.inc()

    def closed(self, how: Ending, tokens: int) -> None:
        self._documents[how].inc()
        if how == "done":
            self._document_tokens.observe(tokens)
            length = metrics.length_label(tokens)
            self._enlarge(length, "resident", self.memory.resident)
            self._enlarge(length, "device", self.memory.device)

    def _enlarge(self, length: str, memory: str, size: int) -> None:
        """Tell the memory beside a document so long, if it is the largest so far."""
        if size > self._largest.get((length, memory), 0):
            self._largest[length, memory] = size
            metrics.LENGTH_MEMORY_BYTES.labels(self._model, length, memory).set(size)
