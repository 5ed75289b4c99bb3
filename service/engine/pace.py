"""When to launch the step behind the one that runs."""

from __future__ import annotations

LEAD_S = 0.003
"""How long before a step should end the next is launched: what the loop and a launch may take. More
lets what comes meanwhile wait for one more step."""


class Pace:
    """Expects a step to take as long as the last one on so many rows did."""

    def __init__(self, now: float) -> None:
        self._ended_at = now
        self._seconds: dict[int, float] = {}

    def began(self, launched_at: float) -> float:
        """When the step that is to end next began to run: steps run one after the other."""
        return max(launched_at, self._ended_at)

    def next_launch(self, launched_at: float, rows: int) -> float:
        """When to launch the step behind one on `rows` rows: at once, if none was seen so far."""
        return self.began(launched_at) + self._seconds.get(rows, 0.0) - LEAD_S

    def ended(self, now: float) -> None:
        """The step that ran has ended."""
        self._ended_at = now

    def learn(self, rows: int, seconds: float) -> None:
        """So long did a step on `rows` rows take."""
        self._seconds[rows] = seconds
