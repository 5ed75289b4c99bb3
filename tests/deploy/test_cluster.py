"""The Serve config of the manifests on a Ray of this machine: workers come and go with the load."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from gma.service.app.application import WORKER
from gma.service.app.deployments import APPLICATION
from gma.service.app.ray import LOOPBACK
from tests.deploy import kustomize
from tests.deploy.manifests import serve_config, service
from tests.service.asgi import PATIENCE_S, TEXT, save_checkpoint
from tests.service.running import PLAIN, Connection, free_port

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
LONG = TEXT * 60


def config(folder: Path, port: int) -> dict[str, Any]:
    """The CPU variant's, for a tiny model that is slow enough, in seconds instead of minutes."""
    made = serve_config(service(kustomize.build(FOLDER / "cpu")))
    made["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = made["applications"]
    application["args"] |= {
        "checkpoint": str(save_checkpoint(folder / "tiny")),
        "metrics_dir": str(folder / "metrics"),
        "api_keys_file": None,
        "threads": 1,
        "rows": 1,
        "chunk_tokens": 8,
    }
    scaling = application["deployments"][1]["autoscaling_config"]
    scaling |= {
        "min_replicas": 1,
        "max_replicas": 2,
        "upscale_delay_s": 1,
        "downscale_delay_s": 1,
        "look_back_period_s": 2,
        "metrics_interval_s": 1,
    }
    scaling["policy"]["policy_kwargs"] = {"tokens_per_worker": 2000}
    return made


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """Where the service answers."""
    port = free_port()
    # Ray reads it once in a process, in which other tests start the service.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(
        address="local",
        _node_ip_address=LOOPBACK,
        num_cpus=12,  # 2 workers of 4, and gateways
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        client: Any = _get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate(config(tmp_path, port)))
        client._wait_for_application_running(APPLICATION, timeout_s=120)
        yield port
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def workers() -> int:
    states = serve.status().applications[APPLICATION].deployments[WORKER].replica_states
    return sum(count for state, count in states.items() if state == "RUNNING")


async def until(count: int) -> None:
    """Wait until so many workers run."""
    async with asyncio.timeout(6 * PATIENCE_S):
        while await asyncio.to_thread(workers) != count:
            pass


@pytest.mark.slow
@pytest.mark.long
def test_workers_come_with_queued_tokens_and_go_without_losing_a_document(port: int) -> None:
    url = f"http://127.0.0.1:{port}"

    async def load(http: httpx.AsyncClient) -> None:
        for _ in itertools.count():
            response = await http.post(f"{url}/v1/documents", content=LONG, headers=PLAIN)
            assert response.status_code == 200, response.text

    async def run() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(timeout=6 * PATIENCE_S) as http, AsyncExitStack() as stack:
            assert workers() == 1
            clients = [asyncio.create_task(load(http)) for _ in range(6)]
            await until(2)
            held = []
            for _ in range(4):  # on every worker one at least: the idlest takes it
                opening = Connection.open(port, "application/x-ndjson")
                connection = await stack.enter_async_context(opening)
                await connection.send(TEXT.encode())
                await connection.event()
                held.append(connection)
            assert not any(client.done() for client in clients)
            for client in clients:
                client.cancel()
            await asyncio.wait(clients)
            await until(1)
            ends = []
            for connection in held:
                await connection.send(TEXT.encode(), last=True)
                while (event := await connection.event())["event"] == "progress":
                    pass
                ends.append(event)
            return ends

    ends = asyncio.run(run())
    assert [end["event"] for end in ends] == ["result"] * 4, ends
    assert len({end["usage"]["tokens"] for end in ends}) == 1
