"""How long a training will still take, measured as it goes."""

from __future__ import annotations

import time

from gma.model.training.schedule import Schedule

PROBE = 4
"""Steps after which the first estimate is told; the first of them does not count."""

READING = 1 / 3
"""Time that a token takes to be read, of what it takes to be learned from."""


class Pace:
    """Measures steps and evaluations, and says how long the rest of them will take."""

    def __init__(self, config: Schedule, step: int, tokens_of_evaluation: int) -> None:
        """``step``: where the run is; ``tokens_of_evaluation``: how many one reads, about."""
        self._config, self._began = config, step
        self._reads = tokens_of_evaluation
        self._evaluated: float | None = None  # seconds
        self._seconds, self._steps = 0.0, 0
        self._started = time.monotonic()

    @property
    def probed(self) -> int:
        """The step after which there is a first estimate."""
        return self._began + PROBE

    def stepped(self, step: int) -> None:
        """Take note that a step is done."""
        now = time.monotonic()
        if step > self._began + 1:  # the first one warms up
            self._seconds, self._steps = self._seconds + now - self._started, self._steps + 1
        self._started = now

    def evaluated(self) -> None:
        """Take note that an evaluation is done, since the last step."""
        now = time.monotonic()
        self._evaluated, self._started = now - self._started, now

    def left(self, step: int, tokens_of_step: float) -> str:
        """Say how long it will take from here, of steps that learn from so many tokens each."""
        of_step = self._seconds / max(self._steps, 1)
        of_evaluation = self._evaluated
        if of_evaluation is None:
            of_evaluation = READING * self._reads * of_step / tokens_of_step
        evaluations = -(-self._config.steps // self._config.evaluate_every)
        evaluations -= step // self._config.evaluate_every
        return spoken((self._config.steps - step) * of_step + evaluations * of_evaluation)


def spoken(seconds: float) -> str:
    """Say a time as people do: ``about 5 minutes``."""
    if seconds < 90:
        whole = max(1, round(seconds))
        return f"about {whole} second{'s' if whole > 1 else ''}"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} minutes"
    return f"about {seconds / 3600:.1f} hours"
