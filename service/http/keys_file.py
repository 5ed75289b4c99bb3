"""A file of API keys that may be replaced while the service runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from gma.service.gateway.allowance import UNLIMITED, Allowance, Key
from gma.service.http.keys import Keys
from gma.service.observe import metrics
from gma.service.watched import version_of

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often, at most, it is looked whether the file has changed."""


class KeysFile:
    """The keys of a file that may be replaced while the service runs.

    It is looked at when a key is asked for, every LOOK_S at most. What can't be used changes
    nothing: the keys that there were go on passing, and the log says why.
    """

    def __init__(
        self,
        file: Path,
        clock: Callable[[], float] = time.monotonic,
        *,
        default: Allowance = UNLIMITED,
    ) -> None:
        """`default`: of keys of which the file says nothing. Raises ValueError if the file can't be
        used."""
        self._file = file
        self._default = default
        self._clock = clock
        self._looked_at = clock()
        self._seen = version_of(file)
        self._keys = Keys.load(file, default)

    def find(self, key: str) -> Key | None:
        """As `Keys.find`, of the file as it is now."""
        if self._clock() >= self._looked_at + LOOK_S:
            self._look()
        return self._keys.find(key)

    def _look(self) -> None:
        self._looked_at = self._clock()
        version = version_of(self._file)
        if version == self._seen:
            return
        self._seen = version  # as it was before it is read: what is written meanwhile is news
        try:
            self._keys = Keys.load(self._file, self._default)
        except ValueError as error:
            metrics.KEYS_READS.labels("refused").inc()
            logger.error("the changed file of API keys can't be used, the old keys stay: %s", error)
        else:
            metrics.KEYS_READS.labels("taken").inc()
            logger.warning("the file of API keys has changed, and was read again")
