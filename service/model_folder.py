"""The folder that GMA_CHECKPOINT names, a checkpoint or an export of one, read without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from pydantic import ValidationError

from gma.model.config import ModelConfig, lacking, problems
from gma.service.settings import Settings

if TYPE_CHECKING:
    from gma.export.artifact import Artifact


class ModelFolder(NamedTuple):
    """A model's description, and where its tokenizer lies."""

    config: ModelConfig
    tokenizer: Path

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Read the folder of the model that the settings name.

        Raises ValueError if it is neither, and if another backend runs it.
        """
        folder, runtime = settings.checkpoint, settings.runtime
        if runtime == "torch" and settings.holds_export and not settings.holds_checkpoint:
            raise ValueError(
                f"{folder} is an exported model: leave GMA_BACKEND out, or let GMA_CHECKPOINT name "
                "the checkpoint that it was made of"
            )
        if runtime == "onnx" and settings.holds_checkpoint and not settings.holds_export:
            raise ValueError(
                f"{folder} is a checkpoint, not an exported model: leave GMA_BACKEND out, or make "
                "one with `gma export` and let GMA_CHECKPOINT name that"
            )
        config = _checkpoint(folder) if runtime == "torch" else exported_for(settings).config
        return cls(config, folder / "tokenizer.json")


@contextmanager
def needing_onnx() -> Iterator[None]:
    """A context for imports that the extra `onnx` brings. Raises ValueError if one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"an exported model needs {error.name}, which is not installed: gma-service[onnx] "
            "has it"
        ) from error


def exported_for(settings: Settings) -> Artifact:
    """The exported model that the settings name. Raises ValueError if they ask for another."""
    with needing_onnx():
        from gma.export.artifact import Artifact
    exported = Artifact.open(settings.checkpoint)
    manifest = exported.manifest
    if settings.dtype not in ("auto", manifest.precision):
        raise ValueError(
            f"GMA_DTYPE is {settings.dtype}, but {settings.checkpoint} is in {manifest.precision}: "
            "leave it out, or export the checkpoint again"
        )
    settings.grid(on_gpu=False, fixed_chunk=manifest.chunk)
    return exported


def _checkpoint(checkpoint: Path) -> ModelConfig:
    reason, file = lacking(checkpoint), checkpoint / "config.json"
    if reason and not file.is_file():
        raise ValueError(reason)
    try:
        config = ModelConfig.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{file}: {problems(error)}") from error
    if reason:
        raise ValueError(reason)
    return config
