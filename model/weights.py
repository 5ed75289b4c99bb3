"""Checkpoints: a folder of ``config.json``, ``model.safetensors`` and ``tokenizer.json``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn
from torch.overrides import TorchFunctionMode

from gma.model.backbone import Backbone
from gma.model.classifier import Classifier
from gma.model.config import (
    FILES,
    BackboneConfig,
    ModelConfig,
    backbone_of,
    lacking,
    named,
    problems,
)
from gma.model.tokenizer import Tokenizer

POOLING = "pooling."
"""What names of tensors begin with that a base lacks."""

Config = TypeVar("Config", bound=BackboneConfig)

STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class CheckpointError(ValueError):
    """A checkpoint that can't be used; the message says what is wrong with it."""


class Undrawn(TorchFunctionMode):
    """Modules made in it leave their weights as they are.

    On the meta device there is nothing to draw, but drawing from a normal distribution there would
    import the compiler: seconds and 100 MB of every process that loads a checkpoint.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        drawing = getattr(func, "__module__", None) == nn.init.__name__
        return kwargs["tensor"] if drawing else func(*args, **kwargs)


@dataclass(frozen=True)
class Checkpoint:
    """A classifier ready to read, with all that came with it."""

    config: ModelConfig
    classifier: Classifier
    tokenizer: Tokenizer
    fingerprint: str
    """SHA-256 of the three files: states and snapshots belong to exactly one."""


@dataclass(frozen=True)
class Base:
    """What a classifier can begin from: a backbone that has read much, and its tokenizer."""

    config: BackboneConfig
    backbone: Backbone
    tokenizer: Tokenizer
    fingerprint: str
    """SHA-256 of the three files."""


def load(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Checkpoint:
    """Read and check a checkpoint; the classifier comes in eval mode, in ``dtype`` on ``device``.

    Raises CheckpointError for a file that is missing or malformed, for a tokenizer of another size,
    for tensors whose names or shapes are not what ``config.json`` says, or whose dtypes or values
    can't be used, and for a base, which has no labels.
    """
    files = _files(path)
    config = _read(files.config, ModelConfig.model_validate_json)
    tokenizer = _tokenizer(files, config)
    tensors = _tensors(files)
    _check_size(config, tensors, files.weights)
    with torch.device("meta"), Undrawn():
        classifier = Classifier(config)
    _assign(classifier, tensors, files, device, dtype)
    return Checkpoint(config, classifier, tokenizer, _fingerprint(files))


def load_base(path: Path | str) -> Base:
    """Read and check a base, or what a classifier was before its labels; as ``load`` does."""
    files = _files(path)
    config = _read(files.config, backbone_of)
    tokenizer = _tokenizer(files, config)
    tensors = {name: x for name, x in _tensors(files).items() if not name.startswith(POOLING)}
    _check_size(config, tensors, files.weights)
    with torch.device("meta"), Undrawn():
        backbone = Backbone(config)
    _assign(backbone, tensors, files, "cpu", torch.float32)
    return Base(config, backbone, tokenizer, _fingerprint(files))


def is_base(path: Path | str) -> bool:
    """Say whether a checkpoint's folder holds a base: one without labels. Raises CheckpointError
    unless it holds either."""
    description = _files(path).config
    _read(description, backbone_of)
    return b'"labels"' not in description.read_bytes()


def save(
    path: Path | str,
    model: Backbone,
    tokenizer: Tokenizer,
    *,
    card: str,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a checkpoint, of a classifier or a base, with its model card (``README.md``), the
    weights stored in ``dtype``, those that it is too narrow for in float32.

    Whoever loads it meanwhile gets the weights of before or those of after, nothing between.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(model.config.model_dump_json(indent=2) + "\n")
    state = model.state_dict()
    tensors = {name: _stored(x.detach().cpu(), dtype).contiguous() for name, x in state.items()}
    partial = folder / "model.safetensors.partial"
    # Not safetensors' own save_file: its files are readable by their owner only.
    partial.write_bytes(to_bytes(tensors))
    partial.replace(folder / "model.safetensors")
    tokenizer.save(folder / "tokenizer.json")
    (folder / "README.md").write_text(card)


def _stored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x in a dtype, or in float32 if some of it is too large for that."""
    narrow = x.to(dtype)
    lost = narrow.isinf() & x.isfinite()
    return x.to(torch.float32) if lost.any() else narrow


class _Files(NamedTuple):
    config: Path
    weights: Path
    tokenizer: Path


def _files(path: Path | str) -> _Files:
    folder = named(path)
    if reason := lacking(folder):
        raise CheckpointError(reason)
    return _Files(*(folder / name for name in FILES))


def _read(file: Path, parse: Callable[[bytes], Config]) -> Config:
    try:
        return parse(file.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{file}: {problems(error)}") from error


def _tokenizer(files: _Files, config: BackboneConfig) -> Tokenizer:
    try:
        tokenizer = Tokenizer.load(files.tokenizer)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{files.tokenizer} has {tokenizer.vocab_size} tokens, "
            f"config.json says {config.vocab_size}"
        )
    return tokenizer


def _tensors(files: _Files) -> dict[str, torch.Tensor]:
    try:
        return load_file(files.weights)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{files.weights}: {error}") from error


def _assign(
    model: Backbone,
    tensors: dict[str, torch.Tensor],
    files: _Files,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Give a model on the meta device its weights, ready to read."""
    _check(tensors, model.state_dict(), files.weights)
    model.load_state_dict({k: x.to(device, dtype) for k, x in tensors.items()}, assign=True)
    model.requires_grad_(False).eval()
    model.choose_mixers()


def _check_size(config: BackboneConfig, found: dict[str, torch.Tensor], file: Path) -> None:
    """Even without its weights, a model of a billion layers takes all memory there is."""
    if config.layers > len(found):
        raise CheckpointError(
            f"{file}: {len(found)} tensors, and config.json says {config.layers} layers"
        )


def _check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], file: Path) -> None:
    wrong = [f"no tensor {name}" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"unknown tensor {name}" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        x, wanted = found[name], tuple(expected[name].shape)
        if tuple(x.shape) != wanted:
            wrong.append(f"{name} has shape {tuple(x.shape)}, config.json says {wanted}")
        elif x.dtype not in STORED.values():
            wrong.append(f"{name} is {x.dtype}, not one of {', '.join(STORED)}")
        elif not torch.isfinite(x).all():
            wrong.append(f"{name} has values that are not finite")
    if wrong:
        raise CheckpointError(f"{file}: " + "; ".join(wrong[:8]) + (" ..." if wrong[8:] else ""))


def _fingerprint(files: _Files) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
