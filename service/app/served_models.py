"""The models of a service on one machine: those that it is told of, and those of a file as long as
it runs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from gma.service.app.application import Application
from gma.service.app.deployments import build_model
from gma.service.app.models_file import ModelsFile, Wanted, models_of
from gma.service.app.placement import check_room, placed
from gma.service.app.rollout import Fate, Rollout
from gma.service.app.start import StartError, check_model, in_one_line, reason
from gma.service.observe import logs, sharing
from gma.service.settings import Settings

logger = logging.getLogger(__name__)

STATUS_S = 0.1


class ServedModels:
    """Models as applications of Serve on this machine."""

    def __init__(self, settings: Settings, gpus: int, run: Path) -> None:
        """Make it before Ray is started. `run`: the run's folder. Raises StartError if the models
        can't be used."""
        assert settings.metrics_dir
        logs.configure(settings.log_level)
        # Ray imports prometheus_client, and its processes are not to share their metrics.
        sharing.join(settings.metrics_dir)
        from gma.service.link.workers import FORGOTTEN_S
        from gma.service.observe.metrics import MODEL_CHANGES

        del os.environ[sharing.DIRECTORY]
        self._changes = MODEL_CHANGES
        self._started = False
        self._rollout = Rollout(
            ServeApplications(gpus, run), time.monotonic, FORGOTTEN_S, self._count
        )
        self._file = ModelsFile(settings) if isinstance(settings.models, Path) else None
        self._wanted = (
            self._file.look()
            if self._file
            else {name: Wanted.of(each) for name, each in models_of(settings).items()}
        )

    def start(self) -> None:
        """Return when all of them run in the Serve that has been started. Raises StartError if one
        does not."""
        while True:
            self._rollout.step(self._wanted)
            for name, error in self._rollout.refused.items():
                raise StartError(f"{name}: {error}")
            if not self._rollout.starting:
                break
            time.sleep(STATUS_S)
        self._started = True

    def look(self) -> None:
        """Do what is next so that they are as the file says now. What can't be used is logged."""
        if not self._file:
            return
        try:
            self._wanted = self._file.look()
        except StartError as error:
            self._count(error)
            logger.error("the changed file of models can't be used, the models stay: %s", error)
            return
        try:
            self._rollout.step(self._wanted)
        except Exception:
            logger.warning("looking after the models failed", exc_info=True)

    def _count(self, error: Exception | None) -> None:
        if self._started:
            self._changes.labels("refused" if error else "taken").inc()


class ServeApplications:
    """Those of Serve on this machine: see `gma.service.app.rollout.Applications`."""

    def __init__(self, gpus: int, run: Path) -> None:
        self._gpus = gpus
        self._run = run
        self._placed: dict[Application, Settings] = {}

    def start(self, application: Application, settings: Settings) -> None:
        """Begin to start one. Raises StartError for what can't be."""
        check_model(settings)
        settings = placed(settings, self._gpus)
        check_room([*self._placed.values(), settings], self._gpus)
        with in_one_line():
            from ray import serve

            target = serve.RunTarget(
                build_model(settings, run=self._run), name=str(application), route_prefix=None
            )
            serve.run_many(
                [target],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
        self._placed[application] = settings

    def fates(self) -> Mapping[Application, Fate]:
        """What has become of each that was started and not ended."""
        from ray import serve

        found: dict[Application, Fate] = {}
        for name, told in serve.status().applications.items():
            application = Application.parsed(name)
            if application and told.status == "RUNNING":
                found[application] = "running"
            elif application and told.status not in ("NOT_STARTED", "DEPLOYING"):
                found[application] = StartError(reason(told))
        return found

    def end(self, application: Application) -> None:
        """Let one read what it has to the end, and be gone."""
        from ray import serve

        self._placed.pop(application, None)
        serve.delete(str(application), _blocking=False)
