"""Models that were never trained, where only speed and memory count."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.checkpoints import BOOKS
from gma.model import weights
from gma.model.classifier import Classifier
from gma.model.config import ModelConfig

REALISTIC = ModelConfig(
    name="realistic",
    labels=tuple(f"label {i}" for i in range(40)),
    vocab_size=16_384,
    width=256,
    layers=4,
    heads=4,
    routing_dim=32,
    value_dim=64,
    num_components=32,
    mlp_width=512,
)
TINY = REALISTIC.model_copy(
    update={
        "labels": ("a", "b"),
        "vocab_size": 1024,
        "width": 16,
        "layers": 1,
        "heads": 1,
        "routing_dim": 4,
        "value_dim": 16,
        "num_components": 4,
        "mlp_width": 32,
    }
)


def random_classifier(config: ModelConfig) -> Classifier:
    """A model that was never trained, the same each time."""
    torch.manual_seed(0)
    return Classifier(config).requires_grad_(False).eval()


def tiny_checkpoint(folder: Path, **changes: object) -> None:
    """Save a tiny model that shares the tokenizer of `books`. `changes`: of `TINY`'s fields."""
    tokenizer = weights.load(BOOKS).tokenizer
    config = TINY.model_copy(update={"vocab_size": tokenizer.vocab_size, **changes})
    weights.save(folder, random_classifier(config), tokenizer, card="# A random model\n")
