"""Exported models: a folder of ``model.onnx``, ``tokenizer.json`` and ``manifest.json``."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gma.export.inspection import inspect
from gma.export.precision import Precision
from gma.model.config import ModelConfig, problems
from gma.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    import onnx

    from gma.model.weights import Checkpoint

CHUNK = 256
"""Tokens of a row, unless told otherwise."""

LARGEST_CHUNK = 64 * 1024
"""Tokens of a row, at most."""

INLINE = 512 * 1024 * 1024
"""Bytes of weights that lie in the model's own file, at most; it can't be 2 GiB."""

LARGEST_MANIFEST = 4 * 1024 * 1024
"""Bytes of a manifest, at most."""


class ArtifactError(ValueError):
    """An exported model that can't be made or can't be used; the message says why."""


Name: TypeAlias = Literal["model.onnx", "model.onnx.data", "tokenizer.json"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

MODEL: Final = "model.onnx"
WEIGHTS: Final = "model.onnx.data"
TOKENIZER: Final = "tokenizer.json"
MANIFEST: Final = "manifest.json"
FILES: tuple[Name, ...] = MODEL, WEIGHTS, TOKENIZER


class Manifest(BaseModel):
    """What is in the folder.

    Unknown fields are errors. Whoever changes what a field means raises ``format_version``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format_version: Literal[1] = 1
    precision: Precision
    chunk: Annotated[int, Field(gt=0, le=LARGEST_CHUNK, description="tokens of a row")]
    opset: Literal[20] = 20
    checkpoint: Annotated[Sha256, Field(description="fingerprint of the checkpoint it was made of")]
    config: ModelConfig
    files: Annotated[
        dict[Name, Sha256],
        Field(description="SHA-256 of each file but this one"),
    ]


@dataclass(frozen=True)
class Artifact:
    """An exported model that was checked, with its tokenizer."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    fingerprint: str
    """SHA-256 of the manifest, which holds those of the other files. A state belongs to one."""

    @property
    def config(self) -> ModelConfig:
        return self.manifest.config

    @property
    def model(self) -> Path:
        """The file that ONNX Runtime opens."""
        return self.folder / MODEL

    @property
    def nbytes(self) -> int:
        """The bytes of all its files."""
        return sum(file.stat().st_size for file in self.folder.iterdir())

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Check an exported model before anything else reads it.

        Raises ArtifactError for a file that is missing, changed or malformed, and for a model that
        is anything but a step of this service's: see `gma.export.inspection`.
        """
        folder = Path(path)
        manifest, fingerprint = _manifest(folder)
        for name, digest in manifest.files.items():
            if sha256(_regular(folder, name)) != digest:
                raise ArtifactError(f"{folder / name} is not the file that {MANIFEST} names")
        for needed in (MODEL, TOKENIZER):
            if needed not in manifest.files:
                raise ArtifactError(f"{folder / MANIFEST} names no {needed}")
        weights = folder / WEIGHTS if WEIGHTS in manifest.files else None
        try:
            inspect(folder / MODEL, weights, manifest.config, manifest.chunk, manifest.precision)
            tokenizer = Tokenizer.load(folder / TOKENIZER)
        except ValueError as error:
            raise ArtifactError(f"{folder}: {error}") from error
        if tokenizer.vocab_size != manifest.config.vocab_size:
            raise ArtifactError(
                f"{folder / TOKENIZER} has {tokenizer.vocab_size} tokens, "
                f"{MANIFEST} says {manifest.config.vocab_size}"
            )
        return cls(folder, manifest, tokenizer, fingerprint)


def export(
    checkpoint: Path | str,
    out: Path | str,
    *,
    precision: Precision = "float32",
    chunk: int = CHUNK,
    inline: int = INLINE,
) -> Artifact:
    """Write a causal checkpoint as an exported model, the folder ``out``: whole, or not at all.

    A row holds ``chunk`` tokens. Weights of more than ``inline`` bytes get a file of their own.
    Raises ArtifactError for what can't be exported or if something is at ``out``, CheckpointError
    for what is no checkpoint.
    """
    import torch

    from gma.model import weights

    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder} is there already: an exported model is never written over")
    loaded = weights.load(checkpoint, dtype=torch.float64)
    model = _model(loaded, precision, chunk)
    if precision == "int8":
        from gma.export.quantization import quantize

        quantize(model)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        _save(model, partial / MODEL, inline)
        loaded.tokenizer.save(partial / TOKENIZER)
        manifest = Manifest(
            precision=precision,
            chunk=chunk,
            checkpoint=loaded.fingerprint,
            config=loaded.config,
            files={name: sha256(partial / name) for name in FILES if (partial / name).exists()},
        )
        (partial / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        Artifact.open(partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Artifact.open(folder)


def _model(checkpoint: Checkpoint, precision: Precision, chunk: int) -> onnx.ModelProto:
    import torch

    config, classifier = checkpoint.config, checkpoint.classifier
    if not config.causal:
        raise ArtifactError("a bidirectional model has no step to export: it reads whole documents")
    if not config.tail <= chunk <= LARGEST_CHUNK:
        least = max(config.tail, 1)
        raise ArtifactError(f"a row must hold {least} to {LARGEST_CHUNK} tokens, not {chunk}")
    dtype = torch.float32 if precision == "int8" else getattr(torch, precision)
    reach, largest = classifier.hidden_reach(), torch.finfo(dtype).max
    if reach > largest:
        raise ArtifactError(
            f"hidden activations may reach {reach:.0f}, more than {largest:.0f}: "
            f"export it in another precision than {precision}"
        )
    from gma.export.trace import trace

    with _quietly():
        return trace(classifier, dtype, chunk)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the exporters, which tell what they do and name packages that nobody needs."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _save(model: onnx.ModelProto, file: Path, inline: int) -> None:
    import onnx

    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size <= inline:
        file.write_bytes(model.SerializeToString(deterministic=True))
    else:
        onnx.save_model(model, file, save_as_external_data=True, location=WEIGHTS)


def _manifest(folder: Path) -> tuple[Manifest, str]:
    file = _regular(folder, MANIFEST)
    if file.stat().st_size > LARGEST_MANIFEST:
        raise ArtifactError(f"{file} has more than {LARGEST_MANIFEST} bytes")
    content = file.read_bytes()
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise ArtifactError(f"{file}: {problems(error)}") from error
    return manifest, hashlib.sha256(content).hexdigest()


def _regular(folder: Path, name: str) -> Path:
    """Find a file of the folder itself: no link, which may lead anywhere."""
    file = folder / name
    if file.is_symlink() or not file.is_file():
        raise ArtifactError(f"{folder} is not an exported model: it has no file {name} of its own")
    return file


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
