"""This process's memory, as the kernel counts it."""

from __future__ import annotations

import re
from pathlib import Path


def resident_memory() -> tuple[int, int]:
    """Bytes of this process in physical memory, now and at most; zeros where there is no /proc."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0, 0
    # Not getrusage: its peak is inherited from the process that started this one.
    fields = dict(re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB$", status, re.MULTILINE))
    return int(fields.get("VmRSS", 0)) * 1024, int(fields.get("VmHWM", 0)) * 1024
