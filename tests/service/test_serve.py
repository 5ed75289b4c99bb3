"""The command `gma serve` on a machine that is not kind to it."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest

from gma.service.app.run import MARK, PREFIX
from tests.service.asgi import PATIENCE_S, TEXT, save_checkpoint
from tests.service.running import PLAIN, free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

NOBODY = "http://127.0.0.1:9"
PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "grpc_proxy")

# What lies in the current folder, and would be imported in place of what is meant.
MODULES = (
    "model", "service", "gma", "ray", "torch", "numpy", "grpc", "json", "secrets", "uvicorn",
    "prometheus_client", "sitecustomize", "usercustomize",
)  # fmt: skip

LISTENERS = {
    "gma serve": 1,
    "gcs_server": 1,
    "monitor.py": 1,
    "dashboard.py": 1,
    "raylet": 2,
    "ray::DashboardAgent": 2,
    "ray::RuntimeEnvAgent": 1,
    "ray::ServeController": 1,
    "ray::ServeReplica:gma:Worker": 3,
    "ray::ServeReplica:gma:Gateway": 2 * 3,
    "ray::IDLE": 1,
}
"""How many ports each process listens on, at most: a process that Ray keeps ready comes and goes,
and three ports of Ray's have fixed numbers, which another run may have."""


class Served:
    """`gma serve` as a user starts it, in a folder full of traps."""

    def __init__(
        self, folder: Path, temporary: Path, port: int, models: str = "GMA_CHECKPOINT=checkpoint"
    ) -> None:
        self.folder, self.temporary = folder, temporary
        self.url = f"http://127.0.0.1:{port}"
        self.errors = folder / "stderr"
        environment = dict.fromkeys(PROXIES, NOBODY) | {
            "no_proxy": "localhost,127.0.0.1",
            "TMPDIR": str(temporary),
            "GMA_PORT": str(port),
            **dict([models.split("=", 1)]),
            "GMA_THREADS": "1",
        }
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [Path(sys.executable).parent / "gma", "serve"],
                cwd=folder,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        assert self.process.stdout
        assert self.process.stdout.readline().startswith("Ready at"), self.errors.read_text()
        (self.run,) = temporary.glob(f"{PREFIX}*")

    def end(self) -> None:
        """Whatever is left of it."""
        self.process.kill()
        self.process.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self) -> dict[int, str]:
        """Its processes by id, with the name or title of each."""
        mark = f"{MARK}={self.run}".encode()
        found = {self.process.pid: "gma serve"}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().rstrip(b"\0").decode().split("\0")
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    script = next((word for word in words if word.endswith(".py")), words[0])
                    found[int(entry.name)] = script.rpartition("/")[2].partition(".listen")[0]
        return found

    def listening(self) -> list[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
        """By process, the addresses that it listens on."""
        sockets = {}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == "0A":
                    words = bytes.fromhex(local.partition(":")[0])
                    # Each four bytes in the machine's order.
                    packed = b"".join(words[n : n + 4][::-1] for n in range(0, len(words), 4))
                    sockets[f"socket:[{rest[5]}]"] = ipaddress.ip_address(packed)
        found = []
        for pid, name in self.processes().items():
            for held in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if address := sockets.get(str(held.readlink())):
                        found.append((name, address))
        return found

    def classify(self, request_id: str = "one") -> int:
        url = f"{self.url}/v1/documents"
        headers = PLAIN | {"X-Request-Id": request_id}
        with httpx.Client(trust_env=False, timeout=PATIENCE_S) as http:
            return http.post(url, content=TEXT, headers=headers).status_code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it is started."""
    folder = tmp_path_factory.mktemp("current")
    save_checkpoint(folder / "checkpoint")
    trap = f"open({str(folder / 'imported')!r}, 'a').write(__name__)\nraise ImportError(__name__)\n"
    for name in MODULES:
        (folder / f"{name}.py").write_text(trap)
    for name in ("service", "model"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(trap)
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    """One that is started where another was killed, on the same port, while its gateways hang."""
    with TemporaryDirectory(prefix="t-", dir="/tmp") as temporary:
        port = free_port()
        dead = Served(folder, Path(temporary), port)
        hanging = [pid for pid, name in dead.processes().items() if "Gateway" in name]
        try:
            assert len(hanging) == 2
            for pid in hanging:
                os.kill(pid, signal.SIGSTOP)
            dead.process.kill()
            dead.process.wait()
            now = Served(folder, Path(temporary), port)
        finally:
            dead.end()
        assert not any(Path(f"/proc/{pid}").exists() for pid in hanging)
        try:
            yield now
        finally:
            now.end()


def test_nothing_of_the_current_folder_is_imported(served: Served) -> None:
    assert served.classify() == 200
    assert not (served.folder / "imported").exists()


def test_nobody_else_looks_into_its_folder(served: Served) -> None:
    assert served.run.stat().st_mode & 0o777 == 0o700


def test_listens_where_it_is_told_and_for_this_machine(served: Served) -> None:
    listening = served.listening()
    others = {name for name, address in listening if not _is_loopback(address)}
    assert not others
    assert not Counter(name for name, _ in listening) - Counter(LISTENERS)


def _is_loopback(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def test_every_request_has_its_line(served: Served) -> None:
    """However many come at once, in one place, and each is JSON."""
    ids = [f"request-{number}" for number in range(200)]
    with ThreadPoolExecutor(8) as clients:
        assert set(clients.map(served.classify, ids)) == {200}
    # A line is written once its answer has left: a client may be here before it.
    until = time.monotonic() + PATIENCE_S
    while missing := set(ids) - set(lines := _requests(served)):
        assert time.monotonic() < until, missing
    assert len(lines) == len(set(lines))


def _requests(served: Served) -> list[str]:
    """The ids of requests that have lines by now."""
    # What comes after the last line's end is being written.
    lines = [json.loads(line) for line in served.errors.read_text().split("\n")[:-1]]
    return [line["id"] for line in lines if line["message"] == "request"]


def test_a_terminal_that_is_closed_lets_documents_end(served: Served) -> None:
    """It sends SIGHUP to all processes of its group."""
    text = TEXT.encode()

    def slowly() -> Iterator[bytes]:
        yield text[:100]
        os.killpg(served.process.pid, signal.SIGHUP)
        assert served.process.stdout
        assert served.process.stdout.readline().startswith("Stopping")
        yield text[100:]

    with httpx.Client(trust_env=False, timeout=PATIENCE_S) as http:
        url = f"{served.url}/v1/documents"
        assert http.post(url, content=slowly(), headers=PLAIN).status_code == 200
    assert served.process.wait(timeout=60) == 0
    assert not list(served.temporary.iterdir())
    assert len(served.processes()) == 1  # it, which has ended
