from __future__ import annotations

import importlib
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from gma.export.artifact import Artifact, export
from gma.export.precision import Precision
from gma.model import weights
from gma.model.tokenizer import Tokenizer
from tests.model.small import small

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def library() -> Path:
    """The operators' kernels, built if they are older than their source."""
    # One process builds them, and others that want them wait.
    subprocess.run(["flock", "Makefile", "make", "--silent", "ops"], cwd=ROOT, check=True)
    importlib.invalidate_caches()
    gma_ops: Any = importlib.import_module("gma_ops")
    path: Path = gma_ops.library()
    return path


TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom.\n"


def checkpoint_of(folder: Path, **changes: object) -> Path:
    """Write a small checkpoint, with ``changes`` to its configuration."""
    tokenizer = Tokenizer.train(iter([TEXT]), vocab_size=300)
    classifier = small(vocab_size=tokenizer.vocab_size, **changes)
    weights.save(folder, classifier, tokenizer, card="# small", dtype=torch.float32)
    return folder


CHUNK = 70
"""Tokens of a row of exported models: more than a block of them, and no multiple of it."""

Exported = Callable[[Precision], Artifact]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The checkpoint in any precision, made once: who changes it, copies it."""
    folder = tmp_path_factory.mktemp("exported")

    @cache
    def of(precision: Precision) -> Artifact:
        return export(checkpoint, folder / precision, precision=precision, chunk=CHUNK)

    return of


@pytest.fixture(scope="session")
def forgetting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the form that forgets."""
    return checkpoint_of(tmp_path_factory.mktemp("forgetting"), form="forgetting", layers=1)


@pytest.fixture
def folder(exported: Exported, tmp_path: Path) -> Path:
    """A copy of the float32 export, to change."""
    return Path(shutil.copytree(exported("float32").folder, tmp_path / "model"))


@pytest.fixture(scope="session")
def apart(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 export with weights in a file of their own: who changes it, copies it."""
    out = tmp_path_factory.mktemp("apart") / "model"
    return export(checkpoint, out, chunk=CHUNK, inline=0).folder
