"""The cores that there are to use."""

from __future__ import annotations

import os


def cores() -> int:
    """How many cores this process may run on: in a container, perhaps few of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
