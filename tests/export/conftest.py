from __future__ import annotations

import importlib
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def library() -> Path:
    """The operators' kernels, built if they are older than their source."""
    subprocess.run(["make", "--silent", "ops"], cwd=ROOT, check=True)
    importlib.invalidate_caches()
    gma_ops: Any = importlib.import_module("gma_ops")
    path: Path = gma_ops.library()
    return path
