"""The models of a service: which there are, and what the workers of each run with."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, Self

from gma.service.app.start import StartError
from gma.service.settings import NAMES, Settings, SettingsError, is_model_name
from gma.service.watched import Version, version_of

OWN = (
    "checkpoint",
    "backend",
    "device",
    "workers",
    "gpu_share",
    "threads",
    "dtype",
    "ops_library",
    "onnx_memory",
    "compile_cache",
    "rows",
    "chunk_tokens",
    "slots",
    "page_memory",
    "max_waiting_documents",
)
"""Settings that a model may have of its own; the others are the service's."""


def models_of(settings: Settings) -> dict[str, Settings]:
    """By name, what the workers of each model run with; the service's settings where the models say
    nothing. Raises StartError."""
    assert settings.models is not None
    if isinstance(settings.models, dict):
        tables: Mapping[str, Any] = {
            name: {"checkpoint": folder} for name, folder in settings.models.items()
        }
        return {name: _of(settings, name, table) for name, table in tables.items()}
    file = settings.models
    try:
        content = file.read_bytes()
    except OSError as error:
        raise StartError(f"{file} can't be read: {error.strerror}") from error
    try:
        tables = tomllib.loads(content.decode())
        if not tables:
            raise StartError("it names no model: a model is a table, as [contracts]")
        return {name: _of(settings, name, table) for name, table in tables.items()}
    # Of UTF-8 and TOML, which may be too deep; and of a checkpoint's path.
    except (ValueError, RecursionError, OSError, StartError) as error:
        raise StartError(f"{file}: {error}") from error


def _of(settings: Settings, name: str, table: Any) -> Settings:
    if not isinstance(table, dict):
        raise StartError(f"{name} is no table: a model is one, as [contracts]")
    if not is_model_name(name):
        raise StartError(f"[{name}] is no name: {NAMES}")
    for key in table:
        if key not in OWN:
            raise StartError(f"[{name}]: {key} {_unknown(key)}")
    if table.get("checkpoint", "") == "":
        raise StartError(f"[{name}]: checkpoint is missing")
    given = {each: getattr(settings, each) for each in settings.model_fields_set}
    try:
        return Settings.load(**{**given, "models": None, **table})
    except SettingsError as error:
        raise StartError(f"[{name}]: {error}") from error


def _unknown(key: str) -> str:
    if key in Settings.model_fields:
        return "is a setting of the whole service: set its variable"
    close = get_close_matches(key, OWN, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(OWN)}"
    return f"is unknown: {hint}"


class Wanted(NamedTuple):
    """A model as it should be: another of these is another version of it."""

    settings: Settings
    files: tuple[tuple[str, Version | None], ...]
    """Of its folder: by name, which content they have."""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """As its folder is now."""
        try:
            names = sorted(each.name for each in settings.checkpoint.iterdir())
        except (OSError, ValueError):  # the second of a path that can't be one
            names = []
        # What is hidden is being written; a card tells nothing to a worker.
        names = [name for name in names if not name.startswith(".") and not name.endswith(".md")]
        return cls(
            settings, tuple((name, version_of(settings.checkpoint / name)) for name in names)
        )


class ModelsFile:
    """Models that may change while the service runs: the file's tables, or the files in the folders
    that they name."""

    def __init__(self, settings: Settings) -> None:
        """Raises StartError if they can't be used."""
        assert isinstance(settings.models, Path)
        self._file = settings.models
        self._settings = settings
        self._seen = version_of(self._file)
        self._models = models_of(settings)
        self._found = self._settled = self._as_now()

    def look(self) -> dict[str, Wanted]:
        """By name, what there should be. Raises StartError for a file that can't be used, once:
        after that it is as before.

        What has become of a model is told when a second look finds the same: it may be half
        written. One whose folder never rests holds up no other.
        """
        version = version_of(self._file)
        if version != self._seen:
            self._seen = version  # as it was before it is read: what is written meanwhile is news
            self._models = models_of(self._settings)
        found = self._as_now()
        settled = {
            name: (found if found.get(name) == self._found.get(name) else self._settled).get(name)
            for name in found | self._settled
        }
        self._found = found
        self._settled = {name: each for name, each in settled.items() if each}
        return self._settled

    def _as_now(self) -> dict[str, Wanted]:
        return {name: Wanted.of(each) for name, each in self._models.items()}
