"""Classifies documents of any length, streamed through the constant-size state of Gaussian Mixture
Attention (arXiv:2606.18283)."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gma.model.weights import Checkpoint as Checkpoint
    from gma.model.weights import load as load
    from gma.service.client.blocking import Client as Client
    from gma.service.client.blocking import Session as Session
    from gma.service.client.client import AsyncClient as AsyncClient
    from gma.service.client.error import ServiceError as ServiceError
    from gma.service.client.session import AsyncSession as AsyncSession
    from gma.service.python.answer import Answer as Answer
    from gma.service.python.answer import LabelScore as LabelScore
    from gma.service.python.answer import Progress as Progress
    from gma.service.python.answer import Span as Span
    from gma.service.python.classifier import Classifier as Classifier
    from gma.service.python.stream import Stream as Stream

# ONNX Runtime's builds for Linux tell Microsoft of each model that is loaded, from 1.29 on, unless
# this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncSession",
    "Checkpoint",
    "Classifier",
    "Client",
    "LabelScore",
    "Progress",
    "ServiceError",
    "Session",
    "Span",
    "Stream",
    "load",
]

_MODULES = {
    "Answer": "gma.service.python.answer",
    "AsyncClient": "gma.service.client.client",
    "AsyncSession": "gma.service.client.session",
    "Checkpoint": "gma.model.weights",
    "Classifier": "gma.service.python.classifier",
    "Client": "gma.service.client.blocking",
    "LabelScore": "gma.service.python.answer",
    "Progress": "gma.service.python.answer",
    "ServiceError": "gma.service.client.error",
    "Session": "gma.service.client.blocking",
    "Span": "gma.service.python.answer",
    "Stream": "gma.service.python.stream",
    "load": "gma.model.weights",
}


def __getattr__(name: str) -> Any:
    """PyTorch is imported by whoever asks for what needs it, not by the command or the gateways."""
    if name not in _MODULES:
        raise AttributeError(f"module 'gma' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
