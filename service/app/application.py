"""The name by which a model is an application of Serve, and found as one."""

from __future__ import annotations

import re
from typing import NamedTuple

WORKER = "Worker"
"""The deployment that such an application has."""


class Application(NamedTuple):
    """One version of a model. Of several the highest is that which new documents are read by."""

    model: str
    version: int

    def __str__(self) -> str:
        return f"gma-model-{self.model}-{self.version}"

    @classmethod
    def parsed(cls, name: str) -> Application | None:
        """What an application of that name is; None if it is no model."""
        found = re.fullmatch(r"gma-model-(.+)-([0-9]{1,9})", name)
        return cls(found[1], int(found[2])) if found else None
