"""When to launch the step behind the one that runs, and how long what waits will take."""

from __future__ import annotations

LEAD_S = 0.003
"""How long before a step should end the next is launched: what the loop and a launch may take. More
lets what comes meanwhile wait for one more step."""


NEWS = 0.1
"""What the last step weighs in the speed of the steps so far."""


class Pace:
    """Expects a step to take as long as the last one on so many rows did, and steps to read as many
    tokens a second as of late."""

    def __init__(self, now: float) -> None:
        self._ended_at = now
        self._seconds: dict[int, float] = {}
        self._speed = 0.0  # tokens a second

    def began(self, launched_at: float) -> float:
        """When the step that is to end next began to run: steps run one after the other."""
        return max(launched_at, self._ended_at)

    def next_launch(self, launched_at: float, rows: int) -> float:
        """When to launch the step behind one on `rows` rows: at once, if none was seen so far."""
        return self.began(launched_at) + self._seconds.get(rows, 0.0) - LEAD_S

    def ended(self, now: float) -> None:
        """The step that ran has ended."""
        self._ended_at = now

    def learn(self, rows: int, tokens: float, seconds: float) -> None:
        """So long did a step on `rows` rows take, which read so many tokens."""
        self._seconds[rows] = seconds
        speed = tokens / max(seconds, 1e-6)
        self._speed += (NEWS if self._speed else 1.0) * (speed - self._speed)

    def seconds_for(self, tokens: int) -> float:
        """How long steps take to read so many tokens; 0 if none was seen so far."""
        return tokens / self._speed if self._speed else 0.0
