"""Models that are replaced while the service runs: what is started, and what ends, and when."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from gma.service.app.application import Application
from gma.service.app.models_file import Wanted
from gma.service.app.start import StartError
from gma.service.settings import Settings

logger = logging.getLogger(__name__)

Fate: TypeAlias = Literal["starting", "running"] | StartError
"""What has become of an application: the error if it failed."""


class Applications(Protocol):
    """Those of Serve that are models."""

    def start(self, application: Application, settings: Settings) -> None:
        """Begin to start one. Raises StartError for what can't be."""

    def fates(self) -> Mapping[Application, Fate]:
        """What has become of each that was started and not ended."""

    def end(self, application: Application) -> None:
        """Let one read what it has to the end, and be gone."""


@dataclass
class Version:
    """One version of a model."""

    application: Application
    wanted: Wanted
    seen_since: float | None = None
    """When it was first known to run."""


class Rollout:
    """Brings about which models there should be, a step at a time.

    A new version is started beside the old one, which ends once all gateways know the new one. One
    that fails is ended itself, and not tried again before it is another.
    """

    def __init__(
        self,
        applications: Applications,
        clock: Callable[[], float],
        known_s: float,
        on_change: Callable[[StartError | None], None] = lambda _: None,
    ) -> None:
        """`clock` tells seconds; after `known_s` all gateways know a version that runs; `on_change`
        is called when one runs, or with why not."""
        self._applications = applications
        self._clock = clock
        self._known_s = known_s
        self._on_change = on_change
        self._versions: dict[str, list[Version]] = {}
        self._refused: dict[str, tuple[Wanted, StartError]] = {}
        self._last: dict[str, int] = {}  # version of each, ever

    @property
    def starting(self) -> bool:
        """Whether a version has yet to run."""
        return any(each.seen_since is None for each in self._all())

    @property
    def refused(self) -> dict[str, StartError]:
        """By name, why what should be is not."""
        return {name: error for name, (_, error) in self._refused.items()}

    def step(self, wanted: Mapping[str, Wanted]) -> None:
        """Do what can be done now so that those models are there, and no others."""
        self._look()
        for name in [*self._versions.keys() - wanted.keys()]:
            versions = self._versions.pop(name)
            for version in versions:
                self._applications.end(version.application)
            if versions:
                logger.warning("the model %s is removed", name)
        self._refused = {n: x for n, x in self._refused.items() if n in wanted}
        for name, each in wanted.items():
            self._bring_about(name, each)

    def _look(self) -> None:
        """Note what has become of those that were started."""
        if not self.starting:
            return
        fates, now = self._applications.fates(), self._clock()
        for name, versions in self._versions.items():
            for version in [*versions]:
                if version.seen_since is not None:
                    continue
                fate = fates.get(version.application, "starting")
                if isinstance(fate, StartError):
                    versions.remove(version)
                    self._applications.end(version.application)
                    self._refuse(name, version.wanted, fate)
                elif fate == "running":
                    version.seen_since = now
                    logger.warning("the model %s runs, version %d", *version.application)
                    self._on_change(None)

    def _bring_about(self, name: str, wanted: Wanted) -> None:
        versions = self._versions.setdefault(name, [])
        # No gateway has seen them yet.
        unseen = [each for each in versions if each.seen_since is None]
        self._end(versions, [each for each in unseen if each.wanted != wanted])
        if versions and versions[-1].wanted == wanted:
            self._refused.pop(name, None)
            seen_since = versions[-1].seen_since
            if seen_since is not None and self._clock() - seen_since >= self._known_s:
                self._end(versions, versions[:-1])
            return
        if self._refused.get(name, (None,))[0] == wanted:
            return
        self._refused.pop(name, None)
        application = Application(name, self._last.get(name, 0) + 1)
        try:
            self._applications.start(application, wanted.settings)
        except StartError as error:
            self._refuse(name, wanted, error)
            return
        self._last[name] = application.version
        versions.append(Version(application, wanted))

    def _end(self, versions: list[Version], ended: Iterable[Version]) -> None:
        for each in [*ended]:
            versions.remove(each)
            self._applications.end(each.application)

    def _refuse(self, name: str, wanted: Wanted, error: StartError) -> None:
        self._refused[name] = wanted, error
        logger.error("the model %s can't be used, what there was stays: %s", name, error)
        self._on_change(error)

    def _all(self) -> list[Version]:
        return [each for versions in self._versions.values() for each in versions]
