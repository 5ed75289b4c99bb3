"""A run that has ended, as its folder tells it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open

from gma.model import weights
from gma.model.training.errors import TrainingError
from gma.model.training.figures import Labels, Scores, one_hot
from gma.model.training.folder import LOG, RESUME
from gma.model.training.outcome import Outcome
from gma.model.training.prepared import Prepared
from gma.model.training.run import CHECKPOINT, PREPARED, SCORES
from gma.model.weights import Checkpoint

Line = dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """What a run was of, and what it came to: D documents of valid, L labels."""

    prepared: Prepared
    checkpoint: Checkpoint
    configuration: dict[str, Any]
    lines: list[Line]  # of the log
    scores: Scores  # (D, L) of the weights that were kept, on whole documents of valid
    actual: Labels  # (D, L): which labels these documents have

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a run's folder. Raises TrainingError if it is none that was ever evaluated."""
        if not (folder / RESUME).is_file() or not (folder / SCORES).is_file():
            raise TrainingError(f"{folder} holds no run that was evaluated")
        try:
            with safe_open(folder / RESUME, "pt") as opened:
                configuration = json.loads((opened.metadata() or {}).get("config", "{}"))
        except SafetensorError as error:
            raise TrainingError(f"{folder / RESUME}: {error}") from error
        prepared = Prepared.load(folder / PREPARED)
        labels = prepared.valid.labels
        if labels.ndim == 1:
            labels = one_hot(labels.astype(np.int64), len(prepared.labels))
        return cls(
            prepared,
            weights.load(folder / CHECKPOINT),
            configuration,
            [json.loads(line) for line in (folder / LOG).read_text().splitlines()],
            np.load(folder / SCORES, allow_pickle=False).astype(np.float64),
            labels.astype(np.bool_),
        )

    @property
    def outcome(self) -> Outcome:
        """What training ended with."""
        return Outcome.of(self.lines)

    @property
    def evaluations(self) -> list[Line]:
        """All lines that have valid's figures."""
        return [line for line in self.lines if "valid" in line]

    @property
    def warnings(self) -> list[str]:
        """What was odd about the data."""
        return [warning for line in self.lines for warning in line.get("warnings", ())]
