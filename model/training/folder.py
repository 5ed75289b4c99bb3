"""The folder of a run, and whether it can be gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gma.model.config import Place, dotted
from gma.model.training.errors import TrainingError

LOG = "log.jsonl"
RESUME = "resume.safetensors"
"""Files of a run: a line for each report, and all that it takes to go on."""


def resumable(out: Path) -> bool:
    """Say whether a folder holds a run that got as far as its first evaluation."""
    return (out / RESUME).exists()


def check_folder(out: Path, *, resume: bool) -> None:
    """Raise TrainingError for a folder that has no run to resume, or one that is in the way."""
    if resumable(out) != resume:
        wrong = "holds no run to resume" if resume else "holds a run: resume it, or choose another"
        raise TrainingError(f"{out} {wrong}")


def changed_fields(old: Any, new: Any, place: Place = ()) -> list[str]:
    """Say which fields of nested tables differ, with what was and what is."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = dict.fromkeys([*old, *new])
        return [
            x
            for name in names
            for x in changed_fields(old.get(name), new.get(name), (*place, name))
        ]
    return [] if old == new else [f"{dotted(place)} was {json.dumps(old)}, not {json.dumps(new)}"]
