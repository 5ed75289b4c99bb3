"""A Redis of our own, which can be killed."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.service.running import free_port

PATIENCE_S = 20


class RedisServer:
    """A server on loopback that answers when a change is on the disk, in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.url = f"redis://127.0.0.1:{port}/0"
        self._command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1"]
        self._command += ["--dir", str(folder), "--save", ""]
        self._command += ["--appendonly", "yes", "--appendfsync", "always"]
        self._start()

    def kill(self) -> None:
        """As the kernel does it, and start it again on the same data."""
        self._server.kill()
        self._ended()
        self._start()

    def stop(self) -> None:
        self._server.terminate()
        self._ended()

    def _start(self) -> None:
        self._server = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._server.stdout
        assert any("Ready to accept connections" in line for line in self._server.stdout)

    def _ended(self) -> None:
        self._server.wait(PATIENCE_S)
        assert self._server.stdout
        self._server.stdout.close()
