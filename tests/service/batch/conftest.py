from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.service.test_cli import Gma, Result
from tests.service.test_cli import gma as gma

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A reader chooses how many threads its process computes with."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def batch(gma: Gma, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`gma batch` with the tiny model, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GMA_THREADS", "1")
    return partial(gma, "batch", "--checkpoint", checkpoint)
