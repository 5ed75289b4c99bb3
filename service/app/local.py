"""The service on one machine: Ray, Serve and the application, from start to stop."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gma.service.app.deployments import APPLICATION, GATEWAY, build
from gma.service.app.process import gateway_count
from gma.service.app.ray import STOP_SIGNALS, count_gpus, lives, start_ray
from gma.service.app.run import clear_dead, end_processes, parent_folder, run_folder
from gma.service.app.start import StartError, cannot_listen, check, in_one_line, reason
from gma.service.app.stderr import STDERR, shared_stderr
from gma.service.http.port import bound, claimed
from gma.service.observe import sharing
from gma.service.settings import Settings

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

STATUS_S = 0.1

LOOK_S = 1.0
"""How often to look whether Ray lives."""

CLEARED_S = 5.0
"""How long what a dead run left may take to let go of its port."""

REACHED_S = 300.0
"""How long gateways that listen may take to reach a worker that is warm."""


def serve_forever(settings: Settings) -> None:
    """Run the service on this machine until SIGINT, SIGTERM or SIGHUP. Raises StartError, also if
    Ray dies later.

    A first signal lets documents in flight end, a second does not. One that comes before the
    service is ready raises KeyboardInterrupt.
    """
    here = url(settings)
    with StopSignals() as signals, running(settings):
        signals.expect()
        _say(
            f"Ready at {here}. Try: curl --data-binary @FILE -H 'Content-Type: text/plain' "
            f"{here}/v1/documents"
        )
        while not signals.wait(LOOK_S):
            if not lives():
                raise StartError("Ray's own processes were ended: the service can't go on")
        _say("Stopping: waiting for documents in flight. Once more to stop at once.")
        drain(settings.shutdown_timeout_s)


@contextmanager
def running(settings: Settings) -> Iterator[None]:
    """The service on this machine, ready, for as long as the context lasts. Raises StartError."""
    check(settings)
    with ExitStack() as stack:
        with in_one_line():
            # First of all, for what a dead run left may have the port.
            cleared = clear_dead(parent_folder())
            patience_s = CLEARED_S if cleared else 0.0
            stack.enter_context(_claim_port(settings.host, settings.port, patience_s=patience_s))
            folder = stack.enter_context(run_folder())
            _start(settings, folder, stack)
        yield


def _start(settings: Settings, folder: Path, stack: ExitStack) -> None:
    """Start all of it in a private folder; `stack` is to end it."""
    gpus = count_gpus()
    paths = {name: value for name, value in settings if isinstance(value, Path)}
    metrics = (settings.metrics_dir or folder / "metrics").absolute()
    settings = settings.model_copy(
        update={
            "device": device_of(settings, gpus),
            # The processes are in another folder.
            **{name: path.absolute() for name, path in paths.items()},
            "metrics_dir": metrics,
        }
    )
    _clear_metrics(metrics)
    stack.enter_context(shared_stderr(folder / STDERR))
    # Ray leaves some of its processes to end when they notice.
    stack.callback(end_processes, folder)
    stack.callback(_stop_ray)
    start_ray(gateway_count(settings) + settings.workers, gpus, folder)
    from ray import serve

    serve.start(proxy_location="Disabled")
    deploy(settings, folder)
    try:
        _ask_gateways("ready", timeout_s=REACHED_S)
    except TimeoutError:
        raise StartError(f"no worker was reached within {REACHED_S:g} s") from None


def deploy(settings: Settings, run: Path, *, name: str = APPLICATION) -> None:
    """Add the application to a running Serve, and wait until it listens. Raises StartError.

    `run` is the folder of the run, on which its processes depend.
    """
    from ray import serve

    target = serve.RunTarget(build(settings, run=run), name=name, route_prefix=None)
    # Serve itself would look once a second.
    serve.run_many([target], wait_for_applications_running=False)
    while (found := serve.status().applications[name]).status in ("NOT_STARTED", "DEPLOYING"):
        time.sleep(STATUS_S)
    if found.status != "RUNNING":
        raise StartError(reason(found))


def drain(timeout_s: float) -> None:
    """Take no new documents, and wait for those in flight, at most so long."""
    with suppress(TimeoutError):
        _ask_gateways("drain", timeout_s=timeout_s)


def url(settings: Settings) -> str:
    """Where the service answers."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}"


def _ask_gateways(method: str, *, timeout_s: float) -> None:
    """Call a method of every gateway, and wait until all have returned. Raises TimeoutError.

    Not in Serve's threads: after an interruption they would wait on, and this process for them.
    """
    from ray import serve

    async def ask(gateways: DeploymentHandle[Any]) -> None:
        # An interruption cancels the calls, which are then nobody's, and would be told in length.
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        await gateways.broadcast(method).results_async(timeout_s=timeout_s)

    asyncio.run(ask(serve.get_deployment_handle(GATEWAY, APPLICATION)))


def _stop_ray() -> None:
    import ray

    ray.shutdown()


def device_of(settings: Settings, gpus: int) -> str:
    """Where models are to run, cpu or cuda, on a machine with so many GPUs.

    Raises StartError with fewer of them than workers, and for settings that are for the other.
    """
    on_gpu = settings.device == "cuda" or (settings.device == "auto" and gpus > 0)
    if on_gpu and gpus < settings.workers:
        raise StartError(f"{settings.workers} workers on cuda need as many GPUs; there are {gpus}")
    try:
        settings.check_device(on_gpu=on_gpu)
    except ValueError as error:
        raise StartError(str(error)) from error
    return "cuda" if on_gpu else "cpu"


def _clear_metrics(folder: Path) -> None:
    """Raises StartError if metrics can't be shared there."""
    try:
        sharing.prepare(folder)
    except OSError as error:
        raise StartError(
            f"can't keep metrics in {folder}: {error.strerror}. GMA_METRICS_DIR chooses another "
            "folder"
        ) from error


def _claim_port(host: str, port: int, *, patience_s: float) -> socket.socket:
    """Keep the port for gateways of this run, who share it. Raises StartError if it is taken, which
    they would not notice, and is not free within so long."""
    until = time.monotonic() + patience_s
    while True:
        try:
            bound(host, port, shared=False).close()
            return claimed(host, port)
        except OSError as error:
            if time.monotonic() > until:
                raise cannot_listen(host, port, error) from error
            time.sleep(STATUS_S)


class StopSignals:
    """Signals to stop. One that is ignored already, as nohup has SIGHUP, stays so."""

    def __init__(self) -> None:
        self._interrupted = False
        self._came: threading.Event | None = None
        self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def __enter__(self) -> Self:
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def expect(self) -> None:
        """From now on the first is waited for. Until then, and later, one interrupts."""
        self._came = threading.Event()

    def wait(self, timeout_s: float) -> bool:
        """Return when the first has come, or after so long; and whether it has."""
        assert self._came
        return self._came.wait(timeout_s)

    def _on_signal(self, *_: object) -> None:
        if self._came and not self._came.is_set():
            self._came.set()
        elif not self._interrupted:
            # Once: it is no reason to leave processes that those of a terminal, or `timeout`, come
            # twice.
            self._interrupted = True
            raise KeyboardInterrupt


def _say(line: str) -> None:
    with suppress(OSError):  # the terminal may be gone, which is no reason not to drain
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
