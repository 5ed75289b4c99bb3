from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gma.model.training.train import train
from tests.model.training.documents import (
    Train,
    configuration,
    documents,
    write,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "data/train.jsonl", documents(0, 4))
    write(tmp_path / "data/valid.jsonl", documents(1, 2))
    return tmp_path / "data"


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Train:
    def run(out: str = "run", *, resume: bool = False, **training: Any) -> Path:
        config = configuration(tmp_path / "config.toml", **training)
        return train(data, tmp_path / out, config, resume=resume)

    return run
