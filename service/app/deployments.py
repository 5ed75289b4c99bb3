"""The service as a Ray Serve application, and how it is run on one machine.

This module stays light: what needs torch or prometheus_client is imported inside the deployments,
in their own processes, once those are set up; Serve is imported while Ray starts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import ray

from gma.service.app import autoscaling
from gma.service.cores import cores
from gma.service.http.keys import Keys
from gma.service.http.port import bound
from gma.service.model_folder import ModelFolder
from gma.service.observe import logs, traces
from gma.service.runners import kernel_cache
from gma.service.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

    from gma.service.link.remote import Address, WorkerServer

APPLICATION, GATEWAY, WORKER = "gma", "Gateway", "Worker"
METRICS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"

STATUS_S = 0.1

# Calls a replica takes at once. The service's own limits are stricter, and answer with reasons.
GATEWAY_CALLS = 10_000

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Ray takes 127.0.0.1 to mean "find this machine's own address", which others can reach.
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"

# How long a thread may keep the interpreter from the event loop's: by default 5 ms, and whoever
# tokenizes takes its turn again and again.
SWITCH_S = 0.0005

# Gateways, unless settings say how many.
MOST_GATEWAYS, CORES_OF_GATEWAY = 8, 2

# Ray's least. Documents do not pass through it.
OBJECT_STORE_BYTES = 80 * 1024**2


class StartError(Exception):
    """The service can't start; the message says why in one line."""


class WorkerReplica:
    """A worker in its own process. Ready once it is constructed."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        _set_up_process(settings)
        from gma.service.link.remote import WorkerServer
        from gma.service.worker import Worker

        try:
            self._worker = Worker.load(settings)
            await self._worker.start()
        except Exception as error:
            # The name is how the message is found again in Serve's report of the failure.
            raise StartError(" ".join(str(error).split())) from error
        self._server = WorkerServer(self._worker)
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
    from gma.service.link.replicas import FORGOTTEN_S

    await asyncio.sleep(FORGOTTEN_S)
    await server.drain()


class GatewayReplica:
    """A gateway in its own process. What of HTTP reaches it is Serve's to say."""

    def __init__(self, settings: Settings, worker: DeploymentHandle[Any]) -> None:
        _set_up_process(settings)
        # All gateways together tokenize on as many threads as there are cores: beside more, what
        # is short, here and in the worker, would wait for a core.
        threads = max(2, cores() // _gateway_count(settings))
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
        from gma.model.tokenizer import Tokenizer
        from gma.service.gateway.gateway import Gateway
        from gma.service.link.replicas import RayWorkers

        folder = ModelFolder.of(settings)
        self._gateway = Gateway(
            settings,
            folder.config,
            Tokenizer.load(folder.tokenizer),
            RayWorkers(worker, timeout_s=settings.worker_timeout_s),
            threads=threads,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        from gma.service.http.app import create_app

        # Serve's proxy puts the request's id into every answer.
        return create_app(self._gateway, stamp_ids=False)

    async def ready(self) -> None:
        """Returns once this replica reaches a worker: the first call is slow. Raises NotReady."""
        await self._gateway.info()


class ListeningGatewayReplica(GatewayReplica):
    """A gateway that listens itself, on a port that it shares with the others."""

    async def __init__(self, settings: Settings, worker: DeploymentHandle[Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        super().__init__(settings, worker)
        from gma.service.http.app import create_app
        from gma.service.http.listener import Listener

        try:
            self._listener = await Listener.open(
                create_app(self._gateway), settings.host, settings.port
            )
        except OSError as error:
            raise StartError(_cannot_listen(settings.host, settings.port, error)) from error

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


def build(settings: Settings, *, listens: bool = False) -> Application:
    """The application: a gateway deployment in front of a worker deployment.

    With `listens`, gateways do so where the settings say, all on this machine; without, HTTP comes
    from Serve's proxies. Raises StartError if the device is to be found: a cluster's GPUs may yet
    have to come.
    """
    from ray import serve
    from ray.serve.schema import LoggingConfig

    if settings.device == "auto":
        raise StartError("in a cluster, the setting device has to be cpu or cuda")
    common: dict[str, Any] = {
        "graceful_shutdown_timeout_s": settings.shutdown_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.5,
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
    replica = ListeningGatewayReplica if listens else serve.ingress()(GatewayReplica)
    gateway = serve.deployment()(replica).options(
        name=GATEWAY,
        num_replicas=_gateway_count(settings),
        max_ongoing_requests=GATEWAY_CALLS,
        ray_actor_options={"num_cpus": 0},
        **common,
    )
    return gateway.bind(settings, worker.bind(settings))


def deploy(settings: Settings, *, name: str = APPLICATION) -> None:
    """Add the application to a running Serve, and wait until it listens. Raises StartError."""
    from ray import serve

    target = serve.RunTarget(build(settings, listens=True), name=name, route_prefix=None)
    # Serve itself would look once a second.
    serve.run_many([target], wait_for_applications_running=False)
    while (status := serve.status().applications[name].status) in ("NOT_STARTED", "DEPLOYING"):
        time.sleep(STATUS_S)
    if status != "RUNNING":
        raise StartError(_reason(name))


def serve_forever(settings: Settings) -> None:
    """Run the service on this machine until SIGINT or SIGTERM. Raises StartError.

    A first signal lets documents in flight end, a second does not.
    """
    here = url(settings)
    with running(settings), _stop_signals() as stopping:
        _say(
            f"Ready at {here}. Try: curl --data-binary @FILE -H 'Content-Type: text/plain' "
            f"{here}/v1/documents"
        )
        stopping.wait()
        _say("Stopping: waiting for documents in flight. Once more to stop at once.")
        _drain(settings.shutdown_timeout_s)


@contextmanager
def running(settings: Settings) -> Iterator[None]:
    """The service on this machine, ready, for as long as the context lasts. Raises StartError."""
    check(settings)
    _check_port(settings.host, settings.port)
    with ExitStack() as stack:
        folder = settings.metrics_dir
        if folder is None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="gma-metrics-")))
        else:
            folder = _emptied(folder)
        stack.callback(ray.shutdown)
        _start_ray(settings)
        from ray import serve

        settings = settings.model_copy(
            update={
                "device": _device(settings),
                "checkpoint": settings.checkpoint.absolute(),
                "metrics_dir": folder.absolute(),
                "compile_cache": settings.compile_cache and settings.compile_cache.absolute(),
                "api_keys_file": settings.api_keys_file and settings.api_keys_file.absolute(),
                "ops_library": _absolute(settings.ops_library),
            }
        )
        serve.start(proxy_location="Disabled")
        deploy(settings)
        _gateways().broadcast("ready").results()
        yield


def check(settings: Settings) -> None:
    """Raises StartError for files that can't be used, which a replica would tell less well."""
    try:
        ModelFolder.of(settings)
        if settings.api_keys_file:
            Keys.load(settings.api_keys_file)
        traces.check()
    except ValueError as error:
        raise StartError(str(error)) from error


def url(settings: Settings) -> str:
    """Where the service answers."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}"


def _gateways() -> DeploymentHandle[Any]:
    from ray import serve

    return serve.get_deployment_handle(GATEWAY, APPLICATION)


def _drain(timeout_s: float) -> None:
    """Take no new documents, and wait for those in flight, at most so long."""
    with suppress(TimeoutError):
        _gateways().broadcast("drain").results(timeout_s=timeout_s)


def _start_ray(settings: Settings) -> None:
    """Ray for this machine alone, and quiet."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Some of Ray's ports listen on every address, but obey only who has this token.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Serve's own logs go to files in Ray's session folder.
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    # Nothing of ours holds up a replica's event loop, so it needs no second one, to which every
    # message would take two more turns of the interpreter's lock.
    os.environ.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")
    # By default they give way to whatever else runs on the machine, clients for one.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Processes that Ray starts ahead import, before they are needed, what all of ours need.
    os.environ.setdefault("RAY_preload_python_modules", "ray.serve")
    with ThreadPoolExecutor(1) as apart:
        # Meanwhile: Ray's start is mostly waiting for its processes.
        apart.submit(import_module, "ray.serve")
        ray.init(
            address="local",
            _node_ip_address=LOOPBACK,
            # As many processes as Ray starts ahead, by default one a core: ours, Serve's controller
            # and one that Ray takes.
            num_cpus=_gateway_count(settings) + settings.workers + 2,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
        )
    # Not before it is imported, which sets it.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _set_up_process(settings: Settings) -> None:
    """What a deployment's process needs before it imports the rest."""
    logs.configure(settings.log_level)
    sys.setswitchinterval(SWITCH_S)
    if settings.metrics_dir:
        settings.metrics_dir.mkdir(parents=True, exist_ok=True)
        os.environ[METRICS_DIRECTORY] = str(settings.metrics_dir)
    if settings.compile_cache:
        kernel_cache.use(settings.compile_cache)


def _gateway_count(settings: Settings) -> int:
    return settings.gateways or max(1, min(MOST_GATEWAYS, cores() // CORES_OF_GATEWAY))


def _device(settings: Settings) -> str:
    """cpu or cuda. Raises StartError if there are fewer GPUs than workers."""
    resources = ray.cluster_resources() if ray.is_initialized() else {}  # type: ignore[no-untyped-call]
    gpus = int(resources.get("GPU", 0))
    if settings.device == "cpu" or (settings.device == "auto" and not gpus):
        return "cpu"
    if gpus < settings.workers:
        raise StartError(f"{settings.workers} workers on cuda need as many GPUs; there are {gpus}")
    return "cuda"


def _absolute(library: Path | str) -> Path | str:
    return library.absolute() if isinstance(library, Path) else library


def _check_port(host: str, port: int) -> None:
    """Before anything is started: raises StartError if the port is taken, which gateways, who
    share one, would not notice."""
    try:
        bound(host, port, shared=False).close()
    except OSError as error:
        raise StartError(_cannot_listen(host, port, error)) from error


def _cannot_listen(host: str, port: int, error: OSError) -> str:
    return (
        f"can't listen on {host}:{port}: {error.strerror}. "
        "GMA_HOST and GMA_PORT choose another address"
    )


def _emptied(folder: Path) -> Path:
    """Without the metrics of an earlier run."""
    for file in folder.glob("*.db"):
        file.unlink()
    return folder


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second raises KeyboardInterrupt."""
    stopping = threading.Event()

    def on_signal(*_: object) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _reason(name: str) -> str:
    """Why the application `name` failed: one of its replicas' StartError, or Serve's own words."""
    from ray import serve

    application = serve.status().applications[name]
    messages = [deployment.message for deployment in application.deployments.values()]
    found = re.search(rf"{StartError.__name__}: (.+)", "\n".join(messages))
    return found[1] if found else application.message
