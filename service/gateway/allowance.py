"""API keys as the service knows them, and how much each may send.

No metrics here: a start looks at keys before its processes are set up.
"""

from __future__ import annotations

from typing import NamedTuple

from pydantic import BaseModel, ByteSize, ConfigDict

from gma.service.settings import Quantity, Rate, Settings


class Allowance(BaseModel):
    """How much a key may send; 0 is no limit. Raises ValidationError, also for other names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents_per_minute: Rate = 0.0
    bytes_per_day: Quantity = ByteSize(0)

    @classmethod
    def default(cls, settings: Settings) -> Allowance:
        """Of a key that has none of its own."""
        return cls(
            documents_per_minute=settings.key_documents_per_minute,
            bytes_per_day=settings.key_bytes_per_day,
        )


UNLIMITED = Allowance()


class Key(NamedTuple):
    """An API key that passes, as far as the service knows it."""

    hash: str
    name: str
    """For the log and metrics."""
    allowance: Allowance
