from __future__ import annotations

import os

# Set before torch and Ray are imported, for their processes too: one thread each, for the tests run
# in as many processes as there are cores, and not a word to anybody outside, nor a port for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # as the service has it, read when gRPC is imported
os.environ["HF_HUB_OFFLINE"] = "1"

# Triton decides when it is imported, by torch too, whether its kernels are compiled or interpreted.
# This is the NVIDIA driver's device: asking torch would take every selection of tests a second.
if not os.path.exists("/dev/nvidiactl"):  # noqa: PTH110
    os.environ["TRITON_INTERPRET"] = "1"

import ipaddress
import math
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

# Under nohup it would be ignored, by services that tests start too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

MOST_PROCESSES = 8
"""Processes that run tests side by side: more would wait for the longest group."""

# Files whose tests start the service. They are one group, for Ray takes ports of the machine, and
# more than one core. Any other file is a group of its own: its tests share what is made for them.
SERVICE = (
    "tests/attack/test_kills.py",
    "tests/attack/test_sessions.py",
    "tests/deploy/simulation/test_archives.py",
    "tests/deploy/simulation/test_failures.py",
    "tests/deploy/test_cluster.py",
    "tests/deploy/test_image.py",
    "tests/deploy/test_monitoring.py",
    "tests/service/test_app.py",
    "tests/service/test_app_both_ways.py",
    "tests/service/batch/test_cluster.py",
    "tests/service/test_serve.py",
    "tests/service/test_serve_models.py",
)

# Files that take longest. They are begun first, so that all processes end at about the same time.
LONGEST = (
    *SERVICE,
    "tests/export/test_cuda.py",
    "tests/model/fused/test_step.py",
    "tests/model/ops/triton/test_operators.py",
    "tests/export/test_example.py",
    "tests/service/test_fused_runner.py",
    "tests/export/test_library.py",
    "tests/export/test_artifact.py",
    "tests/model/training/test_train.py",
    "tests/export/test_verification.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process a core; none beside this one for tests that are chosen by name, which are few."""
    cores = len(os.sched_getaffinity(0))
    return 0 if cores == 1 or config.option.keyword else min(cores, MOST_PROCESSES)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each process takes a group, runs it in order, and takes the next."""
    from xdist.scheduler import LoadFileScheduling

    class ByGroup(LoadFileScheduling):  # type: ignore[misc]  # has no types
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "service" if file in SERVICE else file

    config.option.loadscopereorder = False  # the order of LONGEST stays
    return ByGroup(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and _file(item) not in SERVICE:
            raise pytest.UsageError(f"{_file(item)} starts the service: name it in {__file__}")
    if hasattr(config, "workerinput"):  # one of several processes
        place = {file: n for n, file in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(_file(item), len(place)))
    _skip_without_gpu(items)


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def _skip_without_gpu(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch  # takes a second that most selections of tests need not spend

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Connections reach this machine only: a test that needs another fails, with its address."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.type == socket.SOCK_STREAM and self.family != socket.AF_UNIX:
            host = ipaddress.ip_address("127.0.0.1" if address[0] == "localhost" else address[0])
            if not (
                host.is_loopback or str(host) in own or any(host in each for each in simulated)
            ):
                raise OSError(f"tests have no network: {address}")
        connect(self, address)

    own = _own_addresses()
    # Those of tests/deploy/simulation: of no machine.
    simulated = [ipaddress.ip_network(each) for each in ("198.18.0.0/24", "2001:db8::/64")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


def _own_addresses() -> set[str]:
    try:
        infos = socket.getaddrinfo(socket.gethostname(), None)
    except socket.gaierror:
        return set()
    return {str(info[4][0]) for info in infos}


@pytest.fixture(scope="module")
def _interpreter() -> Iterator[None]:
    """Triton's interpreter, rounding a float32 to fewer bits as a device does, where it cuts; and
    without what makes it slow."""
    import numpy as np
    import torch
    from triton.language import core as language
    from triton.runtime import interpreter

    convert, numpy_dtype = interpreter._convert_float, interpreter._get_np_dtype
    patch_once, init_type = interpreter._patch_lang, language.block_type.__init__
    narrow = {
        "bf16": (torch.bfloat16, torch.uint16),
        "fp8e4nv": (torch.float8_e4m3fn, torch.uint8),
    }
    known: dict[str, Any] = {}
    patched: dict[str, Any] = {}
    types: dict[Any, dict[str, Any]] = {}
    shapes: dict[str, tuple[Any, Any]] = {}

    def rounding(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if source.name == "bf16" and target.name == "fp32":
            return x.astype(np.uint32) << 16
        if source.name != "fp32" or target.name not in narrow:
            return convert(x, source, target, mode)
        dtype, bits = narrow[target.name]
        return torch.tensor(x).to(dtype).view(bits).numpy()

    def known_dtype(dtype: Any) -> Any:  # it makes a table of all at each call
        if dtype.name not in known:
            known[dtype.name] = numpy_dtype(dtype)
        return known[dtype.name]

    def scan(self: Any, inputs: Any) -> list[Any]:  # it goes from element to element
        along = [x.handle.data.swapaxes(0, self.axis) for x in inputs]
        dtypes = [x.dtype.scalar for x in inputs]
        upto = [tuple(x[0] for x in along)]
        for each in zip(*(x[1:] for x in along), strict=True):
            both = map(self.to_tensor, (*upto[-1], *each), 2 * dtypes)
            upto.append(tuple(x.handle.data for x in self.combine_fn.fn(*both)))
        found = (np.stack(x).swapaxes(0, self.axis) for x in zip(*upto, strict=True))
        return [self.to_tensor(x, y.dtype) for x, y in zip(found, inputs, strict=True)]

    def patch_lang(fn: Any) -> Any:  # it patches modules at each call
        if fn.__module__ not in patched:
            patched[fn.__module__] = patch_once(fn)
        return interpreter._LangPatchScope()  # nothing to restore yet

    def new_type(self: Any, element: Any, shape: Any) -> None:  # as for each step's result
        key = element.name, *shape
        if key not in types:
            init_type(self, element, shape)
            types[key] = vars(self)
        vars(self).update(types[key], element_ty=element)

    def new_tensor(self: Any, handle: Any, made: Any) -> None:
        self.handle, self.type, self.dtype = handle, made, made.scalar
        if made.name not in shapes:
            shape = [*made.shape] if made.is_block() else []
            size = language.constexpr(math.prod(shape))
            shapes[made.name] = language.tuple([*map(language.constexpr, shape)]), size
        self.shape, self.numel = shapes[made.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounding)
        patch.setattr(interpreter, "_get_np_dtype", known_dtype)
        patch.setattr(interpreter, "_patch_lang", patch_lang)
        patch.setattr(interpreter.ScanOps, "generic_scan", scan)
        patch.setattr(language.block_type, "__init__", new_type)
        patch.setattr(language.tensor, "__init__", new_tensor)
        # Sums and products of 32 bits are made again in 64 to see whether they overflow.
        options = interpreter.InterpreterOptions(sanitize_overflow=False)
        patch.setattr(interpreter.interpreter_builder, "options", options)
        yield
        for scope in reversed(patched.values()):
            scope.restore()
