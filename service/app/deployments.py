"""The service as a Ray Serve application: gateways in front of workers.

This module stays light: what needs torch or prometheus_client is imported inside the deployments,
in their own processes, once those are set up; Serve is imported while Ray starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gma.service import heap
from gma.service.app import autoscaling, process
from gma.service.app.application import WORKER, Application
from gma.service.app.start import StartError, cannot_listen, check, check_model
from gma.service.cores import cores_for
from gma.service.errors import NotReady, UnknownModel
from gma.service.model_folder import ModelFolder
from gma.service.observe import traces
from gma.service.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application as Bound
    from ray.serve.handle import DeploymentHandle

    from gma.service.gateway.model import Models
    from gma.service.link.remote import Address, WorkerServer

APPLICATION, GATEWAY = "gma", "Gateway"

HEALTH_CHECK_S = 1.0

READY_S = 0.1
"""How often a gateway that is to be ready looks whether a model is."""

# Calls a replica takes at once. The service's own limits are stricter, and answer with reasons.
GATEWAY_CALLS = 10_000


class WorkerReplica:
    """A worker in its own process. Ready once it is constructed."""

    async def __init__(self, settings: Settings, run: Path | None = None) -> None:  # type: ignore[misc]  # Serve awaits it
        process.set_up(settings, run)
        import ray
        from ray import serve

        from gma.service.link.client import ModelFiles
        from gma.service.link.remote import WorkerServer
        from gma.service.worker import Worker

        application = Application.parsed(serve.get_replica_context().app_name)
        try:
            folder = ModelFolder.of(settings)
            files = ModelFiles(
                folder.config.model_dump_json().encode(), folder.tokenizer.read_bytes()
            )
            self._worker = Worker.load(settings, application and application.model)
            await self._worker.start()
        except Exception as error:
            # The name is how the message is found again in Serve's report of the failure.
            raise StartError(" ".join(str(error).split())) from error
        self._server = WorkerServer(self._worker.engine, self._worker.info, files)
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        address = await self._server.start(host)
        self._address = address._replace(model=self._worker.fingerprint)

    async def address(self) -> Address:
        """Where gateways reach this replica."""
        return self._address

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `gma.service.app.autoscaling` decides by; Serve asks where a worker scales."""
        return {autoscaling.METRIC: self._worker.queued_tokens}

    async def check_health(self) -> None:
        """Serve replaces the replica if this raises."""
        self._worker.check_health()

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Serve awaits this before it ends a replica that is to go."""
        # Not twice: Python calls it too. Not before there is something to wait for.
        server: WorkerServer | None = self.__dict__.pop("_server", None)
        return _drained(server) if server else None


async def _drained(server: WorkerServer) -> None:
    """Wait until gateways give it no new documents, and until those that it has are read."""
    from gma.service.link.workers import FORGOTTEN_S

    await asyncio.sleep(FORGOTTEN_S)
    await server.drain()


class GatewayReplica:
    """A gateway in its own process, which HTTP reaches through Serve's proxy."""

    def __init__(
        self, settings: Settings, worker: DeploymentHandle[Any] | None, run: Path | None = None
    ) -> None:
        """`worker`: those of the only model; without, models are applications of their own."""
        process.set_up(settings, run)
        heap.set_up()
        # All gateways together tokenize on as many threads as there are cores: beside more, what
        # is short, here and in the worker, would wait for a core.
        gateways = process.gateway_count(settings)
        threads = max(2, cores_for(settings) // gateways)
        from gma.service.gateway.gateway import Gateway

        models = _models(settings, worker)
        self._gateway = Gateway(settings, models, threads=threads, gateways=gateways)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from gma.service.http.app import create_app

        # Serve's proxy puts the request's id into every answer.
        return create_app(self._gateway, stamp_ids=False)

    async def ready(self, models: Sequence[str] = ()) -> None:
        """Returns once this replica reaches a worker of each of these models, or else of the only
        one: the first call is slow, and on part of a core very slow."""
        for name in models or (None,):
            while True:
                with suppress(NotReady, UnknownModel):
                    await self._gateway.info(self._gateway.models.choose(name))
                    break
                await asyncio.sleep(READY_S)


def _models(settings: Settings, worker: DeploymentHandle[Any] | None) -> Models:
    if worker is None:
        from gma.service.app.found_models import FoundModels

        return FoundModels(timeout_s=settings.worker_timeout_s)
    from gma.model.tokenizer import Tokenizer
    from gma.service.gateway.model import Model, Models
    from gma.service.link.replicas import Replicas
    from gma.service.link.workers import RemoteWorkers

    folder = ModelFolder.of(settings)
    workers = RemoteWorkers(Replicas(worker).look, timeout_s=settings.worker_timeout_s)
    return Models(Model(folder.config, Tokenizer.load(folder.tokenizer), workers))


class ListeningGatewayReplica(GatewayReplica):
    """A gateway that listens itself, on a port that it shares with the others."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, worker: DeploymentHandle[Any] | None, run: Path | None = None
    ) -> None:
        super().__init__(settings, worker, run)
        from gma.service.http.app import create_app
        from gma.service.http.listener import Listener

        try:
            self._listener = await Listener.open(
                create_app(self._gateway), settings.host, settings.port
            )
        except OSError as error:
            raise cannot_listen(settings.host, settings.port, error) from error

    async def drain(self) -> None:
        """Take no new documents, and return when those taken are answered."""
        await self._gateway.admission.drain()
        await self._gateway.in_thread(traces.flush)
        await self._listener.close()


def application(arguments: dict[str, Any]) -> Bound:
    """What a Serve config's `import_path` names for a service with one model. Its `args` are
    settings: `rows`, not GMA_ROWS.

    Raises SettingsError, or StartError for what else keeps the service from starting.
    """
    return build(_of_model(arguments))


def gateways(arguments: dict[str, Any]) -> Bound:
    """The same for the gateways of a service whose models are applications of their own."""
    return build_gateways(_clustered(arguments))


def model(arguments: dict[str, Any]) -> Bound:
    """The same for one of those models. The application is called gma-model-NAME-VERSION."""
    return build_model(_of_model(arguments))


def _clustered(arguments: dict[str, Any]) -> Settings:
    settings = Settings.load(**arguments)
    if settings.models:
        raise StartError(
            "in a cluster each model is an application of the Serve config, and GMA_MODELS is not "
            "for it"
        )
    check(settings)
    return settings


def _of_model(arguments: dict[str, Any]) -> Settings:
    settings = _clustered(arguments)
    check_model(settings)
    # A cluster's GPUs may yet have to come.
    if settings.device == "auto":
        raise StartError("in a cluster, the setting device has to be cpu or cuda")
    return settings


def build(settings: Settings, *, run: Path | None = None) -> Bound:
    """The application with one model: a gateway deployment in front of a worker deployment.

    With `run`, the folder of a run on one machine, gateways listen where the settings say, and
    nothing else can be reached from outside; without, HTTP comes from Serve's proxies.
    """
    return build_gateways(settings, build_model(settings, run=run), run=run)


def build_model(settings: Settings, *, run: Path | None = None) -> Bound:
    """A model's workers."""
    from ray import serve

    share = settings.gpu_share
    worker = serve.deployment()(WorkerReplica).options(
        name=WORKER,
        num_replicas=settings.workers,
        ray_actor_options={"num_cpus": 0, "num_gpus": share if settings.device == "cuda" else 0},
        **_common(settings),
    )
    return worker.bind(settings, run)


def build_gateways(
    settings: Settings, worker: Bound | None = None, *, run: Path | None = None
) -> Bound:
    """Gateways in front of the only model's workers, or of those that they find."""
    from ray import serve

    replica = ListeningGatewayReplica if run else serve.ingress()(GatewayReplica)
    gateway = serve.deployment()(replica).options(
        name=GATEWAY,
        num_replicas=process.gateway_count(settings),
        max_ongoing_requests=GATEWAY_CALLS,
        ray_actor_options={"num_cpus": 0},
        **_common(settings),
    )
    return gateway.bind(settings, worker, run)


def _common(settings: Settings) -> dict[str, Any]:
    from ray.serve.schema import LoggingConfig

    return {
        "graceful_shutdown_timeout_s": settings.shutdown_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        # Until it asks, Serve does not notice that a process is gone.
        "health_check_period_s": HEALTH_CHECK_S,
        "logging_config": LoggingConfig(log_level="WARNING", enable_access_log=False),
        # A checkpoint that fails once fails always.
        "max_constructor_retry_count": 1,
    }
