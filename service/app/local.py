"""The service on one machine: Ray, Serve and the application, from start to stop."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gma.service.app.deployments import APPLICATION, GATEWAY, build, build_gateways
from gma.service.app.models_file import models_of
from gma.service.app.placement import check_room, placed
from gma.service.app.process import gateway_count
from gma.service.app.ray import STOP_SIGNALS, count_gpus, lives, start_ray
from gma.service.app.run import clear_dead, end_processes, parent_folder, run_folder
from gma.service.app.served_models import STATUS_S, ServedModels
from gma.service.app.start import (
    StartError,
    cannot_listen,
    check,
    check_model,
    in_one_line,
    reason,
)
from gma.service.app.stderr import STDERR, shared_stderr
from gma.service.http.port import bound, claimed
from gma.service.observe import sharing
from gma.service.settings import Settings

if TYPE_CHECKING:
    from ray.serve import Application as Bound
    from ray.serve.handle import DeploymentHandle

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
    with StopSignals() as signals, running(settings) as models:
        signals.expect()
        _say(
            f"Ready at {here}. Try: curl --data-binary @FILE -H 'Content-Type: text/plain' "
            f"{here}/v1/documents"
        )
        while not signals.wait(LOOK_S):
            if not lives():
                raise StartError("Ray's own processes were ended: the service can't go on")
            if models:
                models.look()
        _say("Stopping: waiting for documents in flight. Once more to stop at once.")
        drain(settings.shutdown_timeout_s)


@contextmanager
def running(settings: Settings) -> Iterator[ServedModels | None]:
    """The service on this machine, ready, for as long as the context lasts; and its models, if they
    are named. Raises StartError."""
    check(settings)
    own = _own(settings)
    if not own:
        check_model(settings)
    with ExitStack() as stack:
        with in_one_line():
            # First of all, for what a dead run left may have the port.
            cleared = clear_dead(parent_folder())
            patience_s = CLEARED_S if cleared else 0.0
            stack.enter_context(_claim_port(settings.host, settings.port, patience_s=patience_s))
            folder = stack.enter_context(run_folder())
            models = _start(settings, own, folder, stack)
        yield models


def _own(settings: Settings) -> dict[str, Settings]:
    """By name, what each model runs with, if they are named. Raises StartError."""
    own = models_of(settings) if settings.models else {}
    for name, each in own.items():
        try:
            check_model(each)
        except StartError as error:
            raise StartError(f"{name}: {error}") from error
    return own


def _start(
    settings: Settings, own: Mapping[str, Settings], folder: Path, stack: ExitStack
) -> ServedModels | None:
    """Start all of it in a private folder; `stack` is to end it. `own`: what each model runs with,
    if they are named."""
    gpus = count_gpus()
    metrics = (settings.metrics_dir or folder / "metrics").absolute()
    # A device is a model's, and gateways need none.
    device = {"device": "cpu"} if own else {}
    shared = settings.model_copy(update={"metrics_dir": metrics})
    settings = placed(shared.model_copy(update=device), gpus)
    check_room([placed(each, gpus) for each in own.values()], gpus)
    _clear_metrics(metrics)
    stack.enter_context(shared_stderr(folder / STDERR))
    models = ServedModels(shared, gpus, folder) if own else None
    # Ray leaves some of its processes to end when they notice.
    stack.callback(end_processes, folder)
    stack.callback(_stop_ray)
    workers = sum(each.workers for each in own.values()) or settings.workers
    start_ray(gateway_count(settings) + workers, gpus, folder)
    from ray import serve

    serve.start(proxy_location="Disabled")
    if models:
        models.start()
        deploy(build_gateways(settings, run=folder))
    else:
        deploy(build(settings, run=folder))
    try:
        _ask_gateways("ready", [*own], timeout_s=REACHED_S)
    except TimeoutError:
        raise StartError(f"no worker was reached within {REACHED_S:g} s") from None
    return models


def deploy(bound: Bound, *, name: str = APPLICATION) -> None:
    """Add an application to a running Serve, and wait until it is ready. Raises StartError."""
    from ray import serve

    target = serve.RunTarget(bound, name=name, route_prefix=None)
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


def _ask_gateways(method: str, *arguments: object, timeout_s: float) -> None:
    """Call a method of every gateway, and wait until all have returned. Raises TimeoutError.

    Not in Serve's threads: after an interruption they would wait on, and this process for them.
    """
    from ray import serve

    async def ask(gateways: DeploymentHandle[Any]) -> None:
        # An interruption cancels the calls, which are then nobody's, and would be told in length.
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        await gateways.broadcast(method, *arguments).results_async(timeout_s=timeout_s)

    asyncio.run(ask(serve.get_deployment_handle(GATEWAY, APPLICATION)))


def _stop_ray() -> None:
    import ray

    ray.shutdown()


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
