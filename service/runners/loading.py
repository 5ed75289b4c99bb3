"""What runs the model of some settings: a runner with its weights."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import NamedTuple, cast

import torch

from gma.model import products, weights
from gma.model.classifier import Classifier
from gma.model.fused.obstacles import FusedPrecision, obstacle
from gma.model.products import Precision
from gma.service.cores import cores_for
from gma.service.engine.step import Runner
from gma.service.model_folder import exported_for, needing_onnx
from gma.service.runners.passes import PassRunner
from gma.service.runners.torch import TorchRunner
from gma.service.settings import Settings

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A model ready to run steps."""

    runner: Runner
    fingerprint: str
    """SHA-256 of the checkpoint, or of what was exported of it."""


def load(settings: Settings) -> Loaded:
    """The model of `settings` on the backend that they name.

    Raises CheckpointError, ArtifactError or another ValueError for what can't be used, and
    RuntimeError.
    """
    return _load_onnx(settings) if settings.runtime == "onnx" else _load_torch(settings)


def _load_torch(settings: Settings) -> Loaded:
    torch.set_num_threads(settings.threads or cores_for(settings))
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = weights.load(settings.checkpoint, device=device)
    return Loaded(torch_runner(checkpoint.classifier, settings), checkpoint.fingerprint)


def _load_onnx(settings: Settings) -> Loaded:
    exported = exported_for(settings)
    with needing_onnx():
        from gma.service.runners.onnx import OnnxRunner, default_device
    device = default_device() if settings.device == "auto" else settings.device
    rows, _ = settings.grid(on_gpu=device == "cuda", fixed_chunk=exported.manifest.chunk)
    runner = OnnxRunner(
        exported,
        slots=settings.slots,
        rows=rows,
        device=device,
        library=ops_library(settings),
        threads=settings.threads or cores_for(settings),
        memory=settings.onnx_memory,
    )
    return Loaded(runner, exported.fingerprint)


def torch_runner(classifier: Classifier, settings: Settings) -> Runner:
    """The fastest runner for this model where its weights are, or the one that was asked for.

    Raises ValueError for settings that the device or the model does not allow.
    """
    on_gpu = classifier.embedding.weight.is_cuda
    settings.check_device(on_gpu=on_gpu)
    rows, chunk = settings.grid(on_gpu=on_gpu)
    if not classifier.config.causal:
        if settings.dtype not in ("auto", "float32"):
            raise ValueError(
                f"GMA_DTYPE is {settings.dtype}, but a bidirectional model is read in float32"
            )
        return PassRunner(
            classifier,
            slots=settings.slots,
            page_memory=settings.page_memory,
            rows=rows,
            chunk=chunk,
            compile=on_gpu and _has_compiler(),
        )
    if not on_gpu:
        if settings.dtype in ("bfloat16", "int8"):
            _narrow(classifier, settings.dtype)
        return TorchRunner(classifier, slots=settings.slots, rows=rows, chunk=chunk)
    precision = cast("FusedPrecision", settings.dtype)  # settings let no other pass for torch
    if settings.dtype == "auto":
        precision = "float32" if obstacle(classifier, "bfloat16") else "bfloat16"
    if precision == "float32" and (reason := obstacle(classifier, precision)):
        logger.warning("no fused kernels: %s", reason)
        return TorchRunner(classifier, slots=settings.slots, rows=rows, chunk=chunk, compile=True)
    # Triton is not installed where there is no GPU.
    from gma.service.runners.fused import FusedRunner

    return FusedRunner(
        classifier,
        slots=settings.slots,
        rows=rows,
        chunk=chunk,
        precision=precision,
    )


def _narrow(classifier: Classifier, precision: Precision) -> None:
    """Let a CPU multiply in a precision. Raises ValueError if it would be no faster."""
    if reason := products.obstacle(precision):
        raise ValueError(f"GMA_DTYPE is {precision}, but {reason}")
    classifier.choose_mixers(precision)


def _has_compiler() -> bool:
    """Whether there is the C compiler that torch.compile needs on a GPU; a warning if not."""
    found = any(map(which, [os.environ.get("CC", ""), "gcc", "clang"]))
    if not found:
        logger.warning("no C compiler: passes are not compiled, and take about 1.6 times as long")
    return found


def ops_library(settings: Settings) -> Path | None:
    """The library of the model's operators for ONNX Runtime, if there is one to use."""
    if isinstance(settings.ops_library, Path):
        return settings.ops_library
    if settings.ops_library == "none" or find_spec("gma_ops") is None:
        return None
    library: Path = import_module("gma_ops").library()
    return library
