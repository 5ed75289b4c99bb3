"""Ray for one machine: it listens to nobody else, looks at nothing around it, and is quiet."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from gma.service.app.run import MARK, SESSION, end_processes
from gma.service.app.start import StartError
from gma.service.cores import cores

LOOPBACK = "127.0.0.1"

# Ray's least. Documents do not pass through it.
OBJECT_STORE_BYTES = 80 * 1024**2

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

TOO_LATE = ("timed out during startup", "Timed out waiting for file")

UNNEEDED = ("start_monitor", "start_api_server", "start_log_monitor")

ENVIRONMENT = {
    # Ray takes 127.0.0.1 to mean "find the address that others reach", and listens for them, unless
    # it may not be a cluster. By default that is so on other systems than Linux.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # They would be answered to whoever asks. The service's own are elsewhere.
    "RAY_enable_metrics_collection": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Serve's threads that ask for something once Ray has been stopped would start it again.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Serve's own logs go to files in Ray's session folder.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Nothing of ours holds up a replica's event loop, so it needs no second one, to which every
    # message would take two more turns of the interpreter's lock.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # By default they give way to whatever else runs on the machine, clients for one.
    "RAY_worker_niceness": "0",
    # Processes that Ray starts ahead import, before they are needed, what all of ours need.
    "RAY_preload_python_modules": "ray.serve",
    # A process that is forked while other threads are in gRPC may wait for them for ever.
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    # On part of a core, processes that start at the same time take a minute and more to import it.
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_agent_register_timeout_ms": "600000",
}


def set_environment() -> None:
    """What Ray reads when it is imported, and its processes when they start, unless it is set."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Other users of this machine reach Ray's ports, which obey only who has this token.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def count_gpus() -> int:
    """The GPUs of this machine that this process may use, as Ray counts them."""
    set_environment()
    from ray._private.accelerators import get_accelerator_manager_for_resource

    gpus = get_accelerator_manager_for_resource("GPU")
    assert gpus  # there is one for each kind of which Ray knows, whether it is there or not
    found: int = gpus.get_current_node_num_accelerators()
    visible = gpus.get_current_process_visible_accelerator_ids()
    return found if visible is None else min(found, len(visible))


def start_ray(processes: int, gpus: int, folder: Path) -> None:
    """Start Ray, which is to run so many processes of ours and has so many GPUs, in a private
    folder.

    Raises StartError, or whatever Ray raises.
    """
    set_environment()
    import ray

    session = folder / SESSION
    session.mkdir()
    with ThreadPoolExecutor(1) as apart, _surroundings(folder), _needed_alone(), _own_signals():
        if cores() > 1:
            # Meanwhile: Ray's start is mostly waiting for its processes, 30 s at most.
            apart.submit(import_module, "ray.serve")
        _init(
            folder,
            address="local",
            _node_ip_address=LOOPBACK,
            _temp_dir=str(session),
            # As many processes as Ray starts ahead, by default one a core: ours, Serve's controller
            # and one that Ray takes.
            num_cpus=processes + 2,
            num_gpus=gpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.CRITICAL,
            # Processes of ours have the terminal's own stderr; Ray would fold lines that are alike.
            log_to_driver=False,
        )
    import_module("ray.serve")  # which sets it
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if (host := ray.util.get_node_ip_address()) != LOOPBACK:  # type: ignore[no-untyped-call]
        raise StartError(f"Ray listens on {host}: its environment was set too late, or otherwise")


@contextmanager
def _needed_alone() -> Iterator[None]:
    """Have Ray start no dashboard, autoscaler or reader of logs, which it has no settings for.

    Of what one machine needs they do nothing, in 3 s of a core and 280 MB.
    """
    node: Any = import_module("ray._private.node").Node
    started = {name: getattr(node, name) for name in UNNEEDED}
    for name in UNNEEDED:
        setattr(node, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, start in started.items():
            setattr(node, name, start)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Let this process go on handling signals: Ray's handlers would end it, with a native stack."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    utils: Any = import_module("ray._private.utils")
    native: Any = import_module("ray._raylet")
    handle, connect = utils.set_sigterm_handler, native.CoreWorker

    def connect_and_restore(*arguments: Any) -> Any:
        try:
            return connect(*arguments)
        finally:
            restore()

    utils.set_sigterm_handler, native.CoreWorker = lambda _: None, connect_and_restore
    try:
        yield
    finally:
        utils.set_sigterm_handler, native.CoreWorker = handle, connect
        restore()


def lives() -> bool:
    """Whether all processes that Ray started for itself still run."""
    node: Any = import_module("ray._private.worker")._global_node
    return node is not None and bool(node.remaining_processes_alive())


def _init(folder: Path, **settings: Any) -> None:
    """Start Ray, once more if its first processes were not there in time: by then the disk is not
    what they wait for."""
    import ray

    for last in (False, True):
        try:
            ray.init(**settings)
            return
        except Exception as error:
            if not any(words in str(error) for words in TOO_LATE):
                raise
            if last:
                raise StartError(
                    "Ray's first processes were not ready within its 30 s, twice: this machine is "
                    "too busy, or has too little of a core"
                ) from error
        end_processes(folder)


def keep_to_loopback() -> None:
    """Have Serve open the port of this replica for this machine alone.

    It opens one on all addresses once its constructor is done, and has no setting for it.
    """
    replica: Any = import_module("ray.serve._private.replica")
    add_port = replica.add_port_to_grpc_server

    def add_loopback(server: Any, address: str) -> Any:
        return add_port(server, address.replace("[::]", LOOPBACK))

    replica.add_port_to_grpc_server = add_loopback


@contextmanager
def _surroundings(folder: Path) -> Iterator[None]:
    """What Ray's processes inherit: the folder, to be known by and to be in, and no SIGHUP.

    From the current folder they would import what is named like a module. A terminal that is closed
    sends the signal to every process, and this one is to end them when documents are read.
    """
    before = {name: os.environ.get(name) for name in (MARK, "PYTHONPATH")}
    os.environ[MARK] = str(folder)
    if path := before["PYTHONPATH"]:
        # An empty entry is the current folder, whichever that is.
        entries = [str(Path(each).absolute()) for each in path.split(os.pathsep) if each]
        os.environ["PYTHONPATH"] = os.pathsep.join(entries)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
