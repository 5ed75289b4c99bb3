"""What the OpenAPI page allows is answered as it says, and what it does not allow is refused.

    python -m tests.attack.contract --examples 2000

has schemathesis make requests, with all its checks: so many of each operation, of a service that is
open and of one that asks for keys. Ends with status 1 if it finds anything.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gma.service.http.keys import hash_of
from gma.service.http.listener import Listener
from tests.service.asgi import PATIENCE_S, Service, save_checkpoint
from tests.service.running import free_port

KEY = "gma_one"

CONFIGURATION = """
hooks = "hooks.py"

[[operations]]
include-name = "POST /v1/sessions"
checks.positive_data_acceptance.expected-statuses = [201, 404, 422]

[[operations]]
include-name = "POST /v1/documents:batch"
checks.negative_data_rejection.expected-statuses = [200, 404, 415, 422]

[[operations]]
include-name = "POST /v1/models/{model}/documents:batch"
checks.negative_data_rejection.expected-statuses = [200, 404, 415, 422]
"""
"""Whether bytes are a snapshot, or a name is a model's, can't be told by a schema; lines that are
wrong are 200, and have answers of their own."""

HOOKS = """
import schemathesis

@schemathesis.serializer("application/x-ndjson")
def lines(ctx, value):
    return str(value).encode("utf-8", "replace")
"""
"""Any text is taken for lines."""


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


def found_wrong(folder: Path, *options: str, keys: bool, **model: Any) -> str:
    """What schemathesis says of a service, if it finds anything; it keeps notes in `folder`.

    `model` has what the configuration of the model that is served says differently.
    """
    file = folder / "keys"
    file.write_text(hash_of(KEY))
    (folder / "schemathesis.toml").write_text(CONFIGURATION)
    (folder / "hooks.py").write_text(HOOKS)
    checkpoint = save_checkpoint(folder / "checkpoint", **model)
    if not model.get("causal", True):
        options = (*options, "--exclude-path-regex=^/v1/sessions")  # all are 501
    with listening(
        checkpoint, api_keys_file=file if keys else None, sessions=folder / "sessions"
    ) as url:
        # By its status it is the service's fault if a deadline passes, of which it would try 1 ms.
        header = ["--header=x-deadline-ms: 600000"]
        header += [f"--header=Authorization: Bearer {KEY}"] if keys else []
        return _found_wrong(url, folder, *header, *options)


def _found_wrong(url: str, folder: Path, *options: str) -> str:
    command = Path(sysconfig.get_path("scripts")) / "schemathesis"
    ran = subprocess.run(
        [
            *(command, "run", f"{url}/openapi.json", "--checks=all", "--no-color"),
            "--exclude-path=/v2/models/{model}/infer",  # no schema says that data fit their shape
            *options,
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.stdout + ran.stderr if ran.returncode else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--examples", type=int, default=2000, help="of each operation")
    examples = f"--max-examples={parser.parse_args().examples}"
    for keys in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            if wrong := found_wrong(Path(folder), examples, keys=keys):
                sys.exit(wrong)


if __name__ == "__main__":
    main()
