"""How often a short document moves between files of the service, from its request to its answer.

    python -m tests.service.moves

Every call of a function is a move to its file, and so is going on in a file after one returned; but
for the functions in `VALUES`, which compute a value from what they are given or tell one, and for
those that count or log. The service is one process: a gateway with its application, and a worker
that it reaches by gRPC. Prints the way. A loop that wakes between two calls of another task is
counted where it wakes, so it is a few more than a reader would make.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType

import httpx

from gma.service.gateway.gateway import Gateway
from gma.service.gateway.model import Model, Models
from gma.service.http.app import create_app
from gma.service.link.remote import WorkerServer
from gma.service.link.workers import RemoteWorkers
from tests.service.asgi import Service, save_checkpoint

SERVICE = "/service/"
OBSERVED = {"settings", "errors", "meter", "cores", "tasks"} | {
    "metrics",
    "traces",
    "memory",
    "logs",
}
"""Files that are no part of the way."""

VALUES = {"messages", "media", "scheduler", "evidence", "answers", "pool", "places"}
VALUES |= {"pace", "step", "auth"}
"""Files of values."""

TOLD = {"ready", "runnable", "resident", "done", "queued", "ready_for", "_rows", "_placed"}
TOLD |= {"finite", "blank", "occupancy", "_observe_occupancy", "_too_early", "_launch_at"}
TOLD |= {"__init__", "<lambda>", "<genexpr>", "stage", "count", "touch", "needs"}
"""Functions of values in other files."""

SUSPENDED = 4
"""Bytes of code before a coroutine's first own instruction: who is further goes on."""


class Way:
    """The files that calls lead to, in order."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.on = False

    def called(self, frame: FrameType, event: str, _: object) -> None:
        """What `sys.setprofile` takes."""
        if not self.on or event != "call" or self._resumed(frame):
            return
        here, caller = self._file(frame), frame.f_back
        while caller is not None and self._file(caller) is None:
            caller = caller.f_back
        if here and frame.f_code.co_name not in TOLD:
            for file in (self._file(caller) if caller else None, here):
                if file and (not self.files or self.files[-1] != file):
                    self.files.append(file)

    @staticmethod
    def _resumed(frame: FrameType) -> bool:
        return frame.f_lasti > SUSPENDED

    @staticmethod
    def _file(frame: FrameType) -> str | None:
        _, of_service, file = frame.f_code.co_filename.rpartition(SERVICE)
        if not of_service or "/tests/" in frame.f_code.co_filename:
            return None
        name = Path(file).stem
        return None if name in OBSERVED | VALUES else file.removesuffix(".py")


async def follow(way: Way, folder: Path) -> None:
    """Have one document answered, after others."""
    async with Service(save_checkpoint(folder)) as service:
        server = WorkerServer(service.worker.engine, service.worker.info)
        address = await server.start("127.0.0.1")

        async def look() -> list[object]:
            return [address]

        workers = RemoteWorkers(look, timeout_s=10)  # type: ignore[arg-type]
        model = Model(service.model.config, service.tokenizer, workers)
        gateway = Gateway(service.settings, Models(model))
        transport = httpx.ASGITransport(create_app(gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            for last in (False, False, True):
                way.on = last
                plain = {"content-type": "text/plain"}
                answer = await client.post("/v1/documents", content="short", headers=plain)
                way.on = False
                answer.raise_for_status()
        await server.stop()


def main() -> None:
    way = Way()
    with tempfile.TemporaryDirectory() as folder:
        threading.setprofile(way.called)
        sys.setprofile(way.called)
        try:
            asyncio.run(follow(way, Path(folder)))
        finally:
            sys.setprofile(None)
    sys.stdout.write("\n".join(way.files) + "\n")
    sys.stdout.write(f"{len(way.files) - 1} moves in {len(set(way.files))} files\n")


if __name__ == "__main__":
    main()
