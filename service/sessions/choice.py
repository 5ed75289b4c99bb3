"""Which store of sessions the settings name."""

from __future__ import annotations

from pathlib import Path

from gma.service.sessions.directory import Directory
from gma.service.sessions.store import Store
from gma.service.settings import Settings


def store_of(settings: Settings) -> Store | None:
    """The store that the settings name, if they do. Raises ValueError if it can't be used."""
    where = settings.sessions
    if where is None:
        return None
    if isinstance(where, Path):
        return Directory(where, settings.session_ttl_s)
    try:
        from gma.service.sessions.redis import Redis
    except ModuleNotFoundError as error:
        raise ValueError(
            f"GMA_SESSIONS needs {error.name}, which is not installed: gma-service[redis] has it"
        ) from error
    return Redis(where, settings.session_ttl_s)
