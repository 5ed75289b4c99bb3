"""A service in processes of its own, and what /proc tells of them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Thread
from typing import NamedTuple

STOP_S = 120
TICKS = os.sysconf("SC_CLK_TCK")
_TITLE = re.compile(r"ray::(?:ServeReplica:\w+:)?(\w+)|(raylet|gcs_server)")


class Service(NamedTuple):
    """A service that runs: where it answers, and its first process."""

    url: str
    pid: int


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def service(log: Path | None = None, **settings: object) -> Iterator[Service]:
    """Run `gma serve`, with these settings before the environment's, until the context ends.

    Its log goes to a file, or else where this process's goes. Raises SystemExit if it does not
    start.
    """
    port = free_port()
    given = {f"GMA_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-c", "from gma.service.cli.main import main; main()", "serve"]
    with (
        log.open("w") if log else nullcontext() as stderr,
        subprocess.Popen(  # noqa: S603 (our own command)
            command,
            env=os.environ | given | {"GMA_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout
            if not any(line.startswith("Ready") for line in process.stdout):
                raise SystemExit(f"the service did not start: {log or 'see above'}")
            # What it says from now on must not fill the pipe.
            Thread(target=deque, args=(process.stdout, 0), daemon=True).start()
            yield Service(f"http://127.0.0.1:{port}", process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=STOP_S)


def cpu_seconds(root: int) -> dict[str, float]:
    """CPU time so far of a process and all below it, summed by what each is."""
    found: dict[str, float] = defaultdict(float)
    for pid, fields in family(root).items():
        found[_role(pid)] += (int(fields[11]) + int(fields[12])) / TICKS
    return dict(found)


def resident_bytes(root: int, *, peak: bool) -> dict[str, int]:
    """Resident memory of a process and all below it, or its peak, by what each is.

    Where several are alike, the largest counts.
    """
    field = "VmHWM" if peak else "VmRSS"
    found: dict[str, int] = defaultdict(int)
    for pid in family(root):
        with suppress(OSError):  # it has just ended
            status = (Path("/proc") / str(pid) / "status").read_text()
            if kilobytes := re.search(rf"{field}:\s*(\d+) kB", status):  # a zombie has none
                found[_role(pid)] = max(found[_role(pid)], 1024 * int(kilobytes[1]))
    return dict(found)


def family(root: int) -> dict[int, list[str]]:
    """The fields of /proc's stat, from the third on, of a process and all below it."""
    stats: dict[int, list[str]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):  # it has just ended
                stat = (folder / "stat").read_text()
                stats[int(folder.name)] = stat.rpartition(")")[2].split()

    def is_below(pid: int) -> bool:
        while pid not in (root, 0):
            pid = int(stats[pid][1]) if pid in stats else 0
        return pid == root

    return {pid: fields for pid, fields in stats.items() if is_below(pid)}


def _role(pid: int) -> str:
    try:
        command = (Path("/proc") / str(pid) / "cmdline").read_text().replace("\0", " ")
    except OSError:
        return "other"
    title = _TITLE.search(command)
    return title[1] or title[2] if title else "other"
