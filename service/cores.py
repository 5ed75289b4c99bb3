"""The cores that there are to use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gma.service.settings import Settings


def cores(root: Path = Path("/")) -> int:
    """How many cores this process may keep busy: in a container, perhaps few of the machine's.

    A quota of time counts, rounded up: at half a core it is 1. `root` is where /proc and the
    control groups are.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min([allowed or 1, *(math.ceil(quota) for quota in _quotas(root))]))


def cores_for(settings: Settings) -> int:
    """How many cores the service may keep busy here: those that a setting says, or all that there
    are to use."""
    return settings.cores or cores()


def _quotas(root: Path) -> Iterator[float]:
    """The cores that each control group with a quota grants: this process's, and those above."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return
    paths = {names: path for _, names, path in (line.split(":", 2) for line in groups)}
    for mount in mounts:
        place, _, system = mount.partition(" - ")
        mounted, point = place.split()[3:5]
        kind, _, options = system.split(maxsplit=2)
        if kind == "cgroup2":
            path, read = paths.get(""), _quota
        elif kind == "cgroup" and "cpu" in options.split(","):
            named = (path for names, path in paths.items() if "cpu" in names.split(","))
            path, read = next(named, None), _quota_v1
        else:
            continue
        if path is None:
            continue
        top = root / point.lstrip("/")
        # In a container the path may be the machine's, of which this mount shows a part or nothing.
        inside = path.removeprefix(mounted).lstrip("/") if path.startswith(mounted) else ""
        folder = top / inside if ".." not in inside.split("/") else top
        for group in (folder, *folder.parents):
            if group.is_relative_to(top):
                yield from read(group)


def _quota(group: Path) -> Iterator[float]:
    """Of version 2."""
    try:
        most, period = (group / "cpu.max").read_text().split()
    except OSError:
        return
    if most != "max":
        yield int(most) / int(period)


def _quota_v1(group: Path) -> Iterator[float]:
    try:
        most = int((group / "cpu.cfs_quota_us").read_text())
        period = int((group / "cpu.cfs_period_us").read_text())
    except OSError:
        return
    if most > 0:
        yield most / period
