"""Tiny models that say which labels are there."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from gma.model import weights
from gma.model.reading import read
from gma.service.gateway.scores import scores
from tests.service.asgi import LABELS, TEXT, save_checkpoint

MARGIN = 0.01
"""From a threshold to the score of TEXT: more than any backend is off."""


def deciding(folder: Path, there: Collection[str], *, multi_label: bool, **changes: Any) -> Path:
    """A checkpoint whose thresholds are such that TEXT's scores reach those of `there` alone."""
    save_checkpoint(folder, **changes)
    loaded = weights.load(folder)
    (found,) = read(loaded.classifier, [torch.from_numpy(loaded.tokenizer.encode(TEXT.encode()))])
    thresholds = tuple(
        score - MARGIN if label in there else score + MARGIN
        for label, score in zip(LABELS, scores(found.logits.numpy(), multi_label), strict=True)
    )
    return save_checkpoint(folder, multi_label=multi_label, thresholds=thresholds, **changes)
