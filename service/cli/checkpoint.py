"""The checkpoint that a command is given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gma.service.cli.options import Device

if TYPE_CHECKING:
    from gma.model.weights import Checkpoint


def load(folder: Path | None, device: Device) -> Checkpoint:
    """Load a folder's checkpoint, by default the one that comes with gma, onto a device.

    Raises ValueError if the folder is not a checkpoint's.
    """
    from gma.service.python.classifier import Classifier

    return Classifier.load(folder, device=device.value).checkpoint
