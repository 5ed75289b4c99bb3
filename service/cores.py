"""How many cores there are to use."""

from __future__ import annotations

import os


def cores() -> int:
    """Those that this process may run on, which in a container can be few of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
