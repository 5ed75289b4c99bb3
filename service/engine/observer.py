"""What an engine tells those who count."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Ending: TypeAlias = Literal["done", "failed", "aborted"]


class Queue(NamedTuple):
    """What waits in an engine."""

    tokens: int
    """Tokens of all open documents that no step has taken."""

    head_s: float
    """How long the longest wait for a slot has lasted; 0 if nobody with a chunk ready waits."""


class Observer:
    """Every method is called on the event loop's thread, and does nothing unless overridden."""

    def occupancy(self, waiting: int, slots: int, pages: int) -> None:
        """So many documents are open without a slot, and so many slots and pages are in use."""

    def refused(self) -> None:
        """A document was Overloaded."""

    def admitted(self, seconds: float) -> None:
        """A document took a slot, so long after its first chunk was ready."""

    def stepped(self, rows: int, grid_rows: int, tokens: float, seconds: float) -> None:
        """A step read `tokens` in `rows` of the `grid_rows` rows that it paid for. A token that is
        read in several passes counts in each for its part.

        `seconds` are its own: from its launch or the end of the step before, whichever came later.
        """

    def step_failed(self) -> None:
        """A step raised; its documents are lost."""

    def not_finite(self) -> None:
        """A document failed for numbers that are not finite."""

    def closed(self, how: Ending, tokens: int) -> None:
        """A document ended, of which so many tokens were read."""
