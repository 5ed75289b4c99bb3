"""What goes wrong below a store."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest


def read_only(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let nothing in `folder` be written."""
    opened = os.open

    def read_alone(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and Path(path).is_relative_to(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return opened(path, flags, *rest, **options)

    patch.setattr(os, "open", read_alone)


def full(patch: pytest.MonkeyPatch) -> None:
    """Let no file that is written reach the disk, for there is no room."""

    def fails(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", fails)
