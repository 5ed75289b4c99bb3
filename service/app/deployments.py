"""The service as a Ray Serve application: gateways in front of workers.

This module stays light: what needs torch or prometheus_client is imported inside the deployments,
in their own processes, once those are set up; Serve is imported while Ray starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gma.service import heap
from gma.service.app import autoscaling, process
from gma.service.app.start import StartError, cannot_listen, check
from gma.service.cores import cores_for
from gma.service.errors import NotReady
from gma.service.model_folder import ModelFolder
from gma.service.observe import traces
from gma.service.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

    from gma.service.link.remote import Address, WorkerServer

APPLICATION, GATEWAY, WORKER = "gma", "Gateway", "Worker"

HEALTH_CHECK_S = 1.0

# Calls a replica takes at once. The service's own limits are stricter, and answer with reasons.
GATEWAY_CALLS = 10_000


class WorkerReplica:
    """A worker in its own process. Ready once it is constructed."""

    async def __init__(self, settings: Settings, run: Path | None = None) -> None:  # type: ignore[misc]  # Serve awaits it
        process.set_up(settings, run)
        import ray

        from gma.service.link.remote import WorkerServer
        from gma.service.worker import Worker

        try:
            self._worker = Worker.load(settings)
            await self._worker.start()
        except Exception as error:
            # The name is how the message is found again in Serve's report of the failure.
            raise StartError(" ".join(str(error).split())) from error
        self._server = WorkerServer(self._worker.engine, self._worker.info)
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._address = await self._server.start(host)

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
        self, settings: Settings, worker: DeploymentHandle[Any], run: Path | None = None
    ) -> None:
        process.set_up(settings, run)
        heap.set_up()
        # All gateways together tokenize on as many threads as there are cores: beside more, what
        # is short, here and in the worker, would wait for a core.
        gateways = process.gateway_count(settings)
        threads = max(2, cores_for(settings) // gateways)
        from gma.model.tokenizer import Tokenizer
        from gma.service.gateway.gateway import Gateway
        from gma.service.link.replicas import Replicas
        from gma.service.link.workers import RemoteWorkers

        folder = ModelFolder.of(settings)
        self._gateway = Gateway(
            settings,
            folder.config,
            Tokenizer.load(folder.tokenizer),
            RemoteWorkers(Replicas(worker).look, timeout_s=settings.worker_timeout_s),
            threads=threads,
            gateways=gateways,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        from gma.service.http.app import create_app

        # Serve's proxy puts the request's id into every answer.
        return create_app(self._gateway, stamp_ids=False)

    async def ready(self) -> None:
        """Returns once this replica reaches a worker: the first call is slow, and on part of a core
        very slow."""
        while True:
            with suppress(NotReady):
                await self._gateway.info()
                return


class ListeningGatewayReplica(GatewayReplica):
    """A gateway that listens itself, on a port that it shares with the others."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, worker: DeploymentHandle[Any], run: Path | None = None
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


def application(arguments: dict[str, Any]) -> Application:
    """What a Serve config's `import_path` names. Its `args` are settings: `rows`, not GMA_ROWS.

    Raises SettingsError, or StartError for what else keeps the service from starting.
    """
    settings = Settings.load(**arguments)
    check(settings)
    return build(settings)


def build(settings: Settings, *, run: Path | None = None) -> Application:
    """The application: a gateway deployment in front of a worker deployment.

    With `run`, the folder of a run on one machine, gateways listen where the settings say, and
    nothing else can be reached from outside; without, HTTP comes from Serve's proxies. Raises
    StartError if the device is to be found: a cluster's GPUs may yet have to come.
    """
    from ray import serve
    from ray.serve.schema import LoggingConfig

    if settings.device == "auto":
        raise StartError("in a cluster, the setting device has to be cpu or cuda")
    common: dict[str, Any] = {
        "graceful_shutdown_timeout_s": settings.shutdown_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        # Until it asks, Serve does not notice that a process is gone.
        "health_check_period_s": HEALTH_CHECK_S,
        "logging_config": LoggingConfig(log_level="WARNING", enable_access_log=False),
        # A checkpoint that fails once fails always.
        "max_constructor_retry_count": 1,
    }
    worker = serve.deployment()(WorkerReplica).options(
        name=WORKER,
        num_replicas=settings.workers,
        ray_actor_options={"num_cpus": 0, "num_gpus": int(settings.device == "cuda")},
        **common,
    )
    replica = ListeningGatewayReplica if run else serve.ingress()(GatewayReplica)
    gateway = serve.deployment()(replica).options(
        name=GATEWAY,
        num_replicas=process.gateway_count(settings),
        max_ongoing_requests=GATEWAY_CALLS,
        ray_actor_options={"num_cpus": 0},
        **common,
    )
    return gateway.bind(settings, worker.bind(settings, run), run)
