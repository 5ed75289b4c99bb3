"""Looks at a model file from anywhere, before ONNX Runtime does, and before much is allocated."""

from __future__ import annotations

from pathlib import Path

from model.config import ModelConfig

MODEL, WEIGHTS = "model.onnx", "model.onnx.data"
LARGEST_STATE = 1024**3


def inspect(
    model: Path, weights: Path | None, config: ModelConfig, chunk: int, precision: str
) -> None:
    """TODO"""
