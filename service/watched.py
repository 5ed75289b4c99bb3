"""Files that may change while the service runs."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

Version: TypeAlias = tuple[int, ...]


def version_of(file: Path) -> Version | None:
    """What tells one content of a file from another; None if there is no file.

    Of the file itself, not of a link to it: Kubernetes swaps the folder in which a secret's files
    are, two links away.
    """
    try:
        found = file.stat()
    except (OSError, ValueError):  # the second of a path that can't be one
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
