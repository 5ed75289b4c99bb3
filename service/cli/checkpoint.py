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
    import torch

    from gma.model import weights
    from gma.model.config import DEFAULT_CHECKPOINT

    if device is Device.auto:
        device = Device.cuda if torch.cuda.is_available() else Device.cpu
    return weights.load(folder or DEFAULT_CHECKPOINT, device=device.value)
