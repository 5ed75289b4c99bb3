"""The service on one machine: Ray, Serve and the application, from start to stop."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import ray

from gma.service.app.deployments import APPLICATION, GATEWAY, build
from gma.service.app.process import gateway_count
from gma.service.app.start import StartError, cannot_listen, check, reason
from gma.service.http.port import bound
from gma.service.settings import Settings

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

STATUS_S = 0.1

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Ray takes 127.0.0.1 to mean "find this machine's own address", which others can reach.
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"

# Ray's least. Documents do not pass through it.
OBJECT_STORE_BYTES = 80 * 1024**2


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
        drain(settings.shutdown_timeout_s)


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


def deploy(settings: Settings, *, name: str = APPLICATION) -> None:
    """Add the application to a running Serve, and wait until it listens. Raises StartError."""
    from ray import serve

    target = serve.RunTarget(build(settings, listens=True), name=name, route_prefix=None)
    # Serve itself would look once a second.
    serve.run_many([target], wait_for_applications_running=False)
    while (found := serve.status().applications[name]).status in ("NOT_STARTED", "DEPLOYING"):
        time.sleep(STATUS_S)
    if found.status != "RUNNING":
        raise StartError(reason(found))


def drain(timeout_s: float) -> None:
    """Take no new documents, and wait for those in flight, at most so long."""
    with suppress(TimeoutError):
        _gateways().broadcast("drain").results(timeout_s=timeout_s)


def url(settings: Settings) -> str:
    """Where the service answers."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}"


def _gateways() -> DeploymentHandle[Any]:
    from ray import serve

    return serve.get_deployment_handle(GATEWAY, APPLICATION)


def _start_ray(settings: Settings) -> None:
    """Start Ray for this machine alone, and quietly."""
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
            num_cpus=gateway_count(settings) + settings.workers + 2,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
        )
    # Not before it is imported, which sets it.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _device(settings: Settings) -> str:
    """Where models are to run: cpu or cuda. Raises StartError with fewer GPUs than workers."""
    gpus = int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    if settings.device == "cpu" or (settings.device == "auto" and not gpus):
        return "cpu"
    if gpus < settings.workers:
        raise StartError(f"{settings.workers} workers on cuda need as many GPUs; there are {gpus}")
    return "cuda"


def _absolute(library: Path | str) -> Path | str:
    return library.absolute() if isinstance(library, Path) else library


def _check_port(host: str, port: int) -> None:
    """Raises StartError if the port is taken, which gateways, who share one, would not notice."""
    try:
        bound(host, port, shared=False).close()
    except OSError as error:
        raise cannot_listen(host, port, error) from error


def _emptied(folder: Path) -> Path:
    """The same folder, without the metrics of an earlier run."""
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
