"""A kernel's files in the compile cache, wherever that was carried to. Only Triton imports this."""

from __future__ import annotations

import json
import logging
import tempfile
from functools import cache
from pathlib import Path

from triton import knobs
from triton.runtime.cache import FileCacheManager

logger = logging.getLogger(__name__)


class KernelFolder(FileCacheManager):  # type: ignore[misc]  # has no types
    """Triton's own notes whole paths, and wants to write even where it only reads."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        try:
            super().__init__(key, override, dump)
        except OSError:  # the folder lacks the kernel, and can't be given it
            folder = Path(_elsewhere().name, key)
            folder.mkdir(exist_ok=True)
            self.cache_dir = str(folder)
            self.lock_path = str(folder / "lock")

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Paths of the files that were stored together under this name, if all are there."""
        try:
            noted = json.loads(Path(self._make_path(f"__grp__{filename}")).read_text())
            names = list(noted["child_paths"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not all(map(self.has_file, names)):
            return None
        return {name: self._make_path(name) for name in names}


@cache
def _elsewhere() -> tempfile.TemporaryDirectory[str]:
    """A folder that lasts as long as the process."""
    logger.warning(
        "compile cache: %s lacks kernels and can't be written: each start compiles them",
        knobs.cache.dir,
    )
    return tempfile.TemporaryDirectory(prefix="gma-kernels-")
