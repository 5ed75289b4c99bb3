"""What the OpenAPI page allows is answered as it says, and what it does not allow is refused.

Schemathesis makes the requests, with all its checks.
"""

from __future__ import annotations

import asyncio
import subprocess
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gma.service.http.keys import hash_of
from gma.service.http.listener import Listener
from tests.service.asgi import PATIENCE_S, Service, save_checkpoint
from tests.service.running import free_port

KEY = "gma_one"


@contextmanager
def listening(checkpoint: Path, **settings: Any) -> Iterator[str]:
    """The address of a service in a thread of this process."""
    port, begun, ended = free_port(), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with Service(checkpoint, **settings) as service:
            listener = await Listener.open(service.app, "127.0.0.1", port)
            begun.set()
            await ended.wait()
            await listener.close()

    thread = threading.Thread(target=loop.run_until_complete, args=[serve()])
    thread.start()
    try:
        assert begun.wait(PATIENCE_S)
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


def found_wrong(url: str, folder: Path, *options: str) -> str:
    """What schemathesis says of the service, if it finds anything; it keeps notes in `folder`."""
    command = Path(sysconfig.get_path("scripts")) / "schemathesis"
    ran = subprocess.run(
        [command, "run", f"{url}/openapi.json", "--checks=all", "--no-color", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.stdout + ran.stderr if ran.returncode else ""


@pytest.fixture(params=["open", "with keys"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Its address, and how to get in."""
    checkpoint, file = save_checkpoint(tmp_path / "checkpoint"), tmp_path / "keys"
    file.write_text(hash_of(KEY))
    closed = request.param != "open"
    with listening(checkpoint, api_keys_file=file if closed else None) as url:
        yield url, [f"--header=Authorization: Bearer {KEY}"] if closed else []


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(["--phases=fuzzing", "--max-examples=20"], id="few"),
        pytest.param(["--max-examples=5000"], id="many", marks=pytest.mark.long),
    ],
)
def test_the_description_is_true(
    service: tuple[str, list[str]], cases: list[str], tmp_path: Path
) -> None:
    url, headers = service
    assert not (wrong := found_wrong(url, tmp_path, *cases, *headers)), wrong
