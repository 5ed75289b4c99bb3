"""What clients see while pods, machines and links of the simulated cluster fail.

`pytest -m long tests/deploy/simulation`, as root. The tests share one cluster, which each leaves
whole.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

from gma.service.http.keys import new_key
from tests.deploy.simulation.cluster import PATIENCE_S, Cluster, running, until, url_of
from tests.deploy.simulation.network import Network, lacks
from tests.deploy.simulation.pod import Pod
from tests.service.asgi import TEXT
from tests.service.running import PLAIN, Connection

logger = logging.getLogger(__name__)

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.skipif(lacks() is not None, reason=f"{lacks()}"),
]

RAYS_DRAIN_S = 30
"""Of Ray, from SIGTERM on, unless the manifests say otherwise."""

# More than the least that a client has to send in a second.
PIECE = TEXT.encode() * 6


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    for each in (folder, *folder.parents[:2]):  # for the pods' user
        each.chmod(0o755)
    network = Network(f"gma{os.getpid()}")
    with network.up(), running(network, folder) as made:
        yield made


class Client:
    """One who sends documents to a pod's proxy."""

    def __init__(self, cluster: Cluster, pod: Pod, text: str = TEXT) -> None:
        self._cluster = cluster
        self._pod = pod
        self._text = text
        self.statuses: list[int] = []
        self.longest_s = 0.0

    async def post(self, http: httpx.AsyncClient, key: str | None = None) -> httpx.Response:
        headers = {**PLAIN, "authorization": f"Bearer {key or self._cluster.key}"}
        url = f"{url_of(self._pod.host.address, 8000)}/v1/documents"
        return await http.post(url, content=self._text, headers=headers, timeout=PATIENCE_S)

    @asynccontextmanager
    async def sending(self) -> AsyncIterator[None]:
        """Documents, one after the other, as long as this is open."""

        async def send() -> None:
            async with httpx.AsyncClient() as http:
                while not enough.is_set():
                    began = time.monotonic()
                    response = await self.post(http)
                    self.longest_s = max(self.longest_s, time.monotonic() - began)
                    self.statuses.append(response.status_code)

        enough = asyncio.Event()
        task = asyncio.create_task(send())
        try:
            yield
        finally:
            enough.set()
            await task

    @asynccontextmanager
    async def holding(self, count: int) -> AsyncIterator[list[Connection]]:
        """So many documents, begun and read as far as they came."""
        async with AsyncExitStack() as stack:
            held = []
            for _ in range(count):
                opening = Connection.open(
                    8000, "application/x-ndjson", host=self._pod.host.address, key=self._cluster.key
                )
                connection = await stack.enter_async_context(opening)
                await connection.send(PIECE)
                await connection.event()
                held.append(connection)
            yield held


async def end_of(connection: Connection) -> dict[str, Any]:
    """The last event of a document that is sent to its end."""
    await connection.send(PIECE, last=True)
    return await outcome(connection)


async def outcome(connection: Connection) -> dict[str, Any]:
    while (event := await connection.event())["event"] == "progress":
        pass
    return event


async def waited(condition: Callable[[], object], what: str) -> None:
    await asyncio.to_thread(until, condition, what)


def metric(pod: Pod, name: str) -> float:
    """The sum over a pod's processes."""
    text = httpx.get(f"{url_of(pod.host.address, 9464)}/metrics", timeout=PATIENCE_S).text
    return sum(float(x.rpartition(" ")[2]) for x in text.splitlines() if x.startswith(name))


def is_whole(cluster: Cluster) -> bool:
    """A gateway and a worker on each pod, and traffic to each."""
    addresses = sorted(pod.host.address for pod in cluster.workers)
    return (
        sorted(cluster.replicas("Gateway")) == addresses
        and sorted(cluster.replicas("Worker")) == addresses
        and all(map(cluster.is_ready, cluster.workers))
        and all(cluster.gateways_of(pod) == len(addresses) for pod in cluster.workers)
    )


def replace(cluster: Cluster, lost: Pod) -> None:
    """What KubeRay does for a worker's pod that is lost: another, at another address."""
    lost.kill()
    cluster.workers.remove(lost)
    cluster.workers.append(cluster.start_worker(cluster.host("worker")))


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        async with asyncio.timeout(600):
            await test()

    asyncio.run(within())


@pytest.fixture(autouse=True)
def _whole(cluster: Cluster) -> None:
    until(lambda: is_whole(cluster), "a gateway and a worker on each pod")


def test_each_pod_has_a_gateway_and_a_worker_and_answers(cluster: Cluster) -> None:
    async def test() -> None:
        for pod in cluster.workers:
            client = Client(cluster, pod)
            async with httpx.AsyncClient() as http, client.holding(6) as held:
                assert (await client.post(http)).status_code == 200
                assert (await client.post(http, new_key())).status_code == 401
                ends = await asyncio.gather(*map(end_of, held))
            assert [end for end in ends if end["event"] != "result"] == []

    run(test)


def test_a_key_that_is_added_passes_in_every_pod_and_one_that_is_removed_in_none(
    cluster: Cluster,
) -> None:
    new = new_key()

    async def statuses(key: str) -> set[int]:
        async with httpx.AsyncClient() as http:  # several, for a proxy asks gateways of both pods
            clients = [Client(cluster, pod) for pod in cluster.workers for _ in range(4)]
            return {(await client.post(http, key)).status_code for client in clients}

    def told(key: str, status: int) -> None:
        until(lambda: asyncio.run(statuses(key)) == {status}, f"{status} in every pod", seconds=30)

    cluster.let_pass(new)
    told(new, 200)
    told(cluster.key, 401)
    cluster.let_pass(cluster.key)
    told(cluster.key, 200)
    told(new, 401)


def test_a_wrong_setting_leaves_the_old_version_serving(cluster: Cluster) -> None:
    wrong = copy.deepcopy(cluster.config)
    wrong["applications"][0]["args"]["row"] = 16

    async def test() -> None:
        client = Client(cluster, cluster.workers[0])
        async with client.sending():
            await asyncio.to_thread(cluster.serve, wrong)
            await waited(lambda: cluster.status()["status"] == "DEPLOY_FAILED", "a failure")
            assert "GMA_ROW sets nothing" in cluster.status()["message"] or (
                "did you mean GMA_ROWS" in cluster.status()["message"]
            )
        assert set(client.statuses) == {200}
        await asyncio.to_thread(cluster.serve, cluster.config)
        await waited(lambda: cluster.status()["status"] == "RUNNING", "the application again")

    run(test)


def test_workers_come_and_go_while_documents_are_read(cluster: Cluster) -> None:
    """By the tokens that wait. Who has a document open at one that goes notices nothing."""
    scaled = copy.deepcopy(cluster.config)
    (worker,) = (x for x in scaled["applications"][0]["deployments"] if x["name"] == "Worker")
    worker["autoscaling_config"] |= {
        "min_replicas": 1,
        "max_replicas": 2,
        "upscale_delay_s": 1,
        "downscale_delay_s": 4,
        "look_back_period_s": 2,
        "metrics_interval_s": 0.5,
    }
    worker["autoscaling_config"]["policy"]["policy_kwargs"] = {"tokens_per_worker": 4_000}

    def workers() -> int:
        return len(cluster.replicas("Worker"))

    def is_settled() -> bool:
        return (
            workers() == 1
            and len(cluster.replicas("Gateway")) == len(cluster.workers)
            and cluster.status()["status"] == "RUNNING"
            and all(map(cluster.is_ready, cluster.workers))
            and all(cluster.gateways_of(pod) == len(cluster.workers) for pod in cluster.workers)
        )

    async def test() -> None:
        await asyncio.to_thread(cluster.serve, scaled)
        await waited(is_settled, "a single worker")
        client = Client(cluster, cluster.workers[0])
        long = [Client(cluster, pod, TEXT * 20) for pod in cluster.workers for _ in range(3)]
        async with client.sending(), AsyncExitStack() as stack:
            async with AsyncExitStack() as load:
                for each in long:
                    await load.enter_async_context(each.sending())
                await waited(lambda: workers() == 2, "a second worker")
                held = await stack.enter_async_context(client.holding(8))
            await waited(lambda: workers() == 1, "a single worker again")
            ends = await asyncio.gather(*map(end_of, held))
        assert [end for end in ends if end["event"] != "result"] == []
        assert {status for each in (client, *long) for status in each.statuses} == {200}
        await asyncio.to_thread(cluster.serve, cluster.config)

    run(test)


def test_a_head_may_go_and_another_come_while_documents_are_read(cluster: Cluster) -> None:
    before = cluster.status()["deployments"]["Worker"]["replicas"]

    async def test() -> None:
        client = Client(cluster, cluster.workers[0])
        async with client.sending(), client.holding(4) as held:
            cluster.head.kill()
            count = len(client.statuses)
            await waited(lambda: len(client.statuses) >= count + 20, "answers without a head")
            cluster.head = await asyncio.to_thread(cluster.start_head, cluster.head.host)
            await waited(lambda: is_whole(cluster), "the head knows the pods")
            ends = await asyncio.gather(*map(end_of, held))
        assert set(client.statuses) == {200}
        assert [end for end in ends if end["event"] != "result"] == []

    run(test)
    after = cluster.status()["deployments"]["Worker"]["replicas"]
    assert {each["replica_id"] for each in after} == {each["replica_id"] for each in before}


def test_documents_of_a_worker_that_is_cut_off_go_on_at_another(cluster: Cluster) -> None:
    """In seconds. New ones are read elsewhere, and wait for little."""
    lost, left = cluster.workers

    def moved() -> float:
        return metric(left, "gma_documents_moved_total")

    async def test() -> None:
        client = Client(cluster, left)
        async with client.holding(12) as held:
            lost.host.cut()
            began = time.monotonic()
            async with client.sending():
                await waited(lambda: moved() > 0, "a document goes on at another worker")
                seconds = time.monotonic() - began
                # Those at the other gateway get no answer.
                asking = [asyncio.create_task(end_of(each)) for each in held]
                at_least = int(moved()) + 1
                while sum(task.done() for task in asking) < at_least:
                    await asyncio.wait(
                        [task for task in asking if not task.done()],
                        return_when=asyncio.FIRST_COMPLETED,
                    )
            logger.info("moved after %.1f s, others took up to %.1f s", seconds, client.longest_s)
            assert {task.result()["event"] for task in asking if task.done()} == {"result"}
            assert set(client.statuses) == {200}
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)

    run(test)
    replace(cluster, lost)


def test_a_gateway_that_is_killed_is_counted_by_the_proxies(cluster: Cluster) -> None:
    """Its documents end in 500 and no JSON, of which the service's own metrics know nothing."""
    lost, left = cluster.workers

    def counted() -> float:
        text = httpx.get(f"{url_of(left.host.address, 8080)}/metrics").text
        lines = [x for x in text.splitlines() if x.startswith("ray_serve_num_http_requests_total{")]
        ours = [x for x in lines if 'application="gma"' in x and 'status_code="502"' in x]
        return sum(float(x.rpartition(" ")[2]) for x in ours)

    async def test() -> None:
        async with AsyncExitStack() as stack:
            held = []
            for _ in range(4):
                opening = Connection.open(
                    8000, "application/json", host=left.host.address, key=cluster.key
                )
                connection = await stack.enter_async_context(opening)
                await connection.send(PIECE)
                held.append(connection)
            before = counted()
            await asyncio.sleep(1)  # until both gateways have some
            lost.kill()
            asking = [asyncio.create_task(each.line_with(b"HTTP/1.1")) for each in held]
            done, rest = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            assert {task.result() for task in done} == {b"HTTP/1.1 500 Internal Server Error\r\n"}
            for task in rest:
                task.cancel()
            await waited(lambda: counted() > before, "a count")

    run(test)
    replace(cluster, lost)


def test_a_pod_that_is_to_go_reads_its_documents_to_their_ends(cluster: Cluster) -> None:
    """Longer than Ray would let it: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S is read."""
    going, staying = cluster.workers

    async def test() -> None:
        client = Client(cluster, staying)
        async with client.sending(), client.holding(6) as held:
            going.terminate("ray")
            end = time.monotonic() + RAYS_DRAIN_S + 10
            while time.monotonic() < end:
                for each in held:
                    await each.send(PIECE)
                await asyncio.sleep(1)
            assert not going.ended("ray")
            ends = await asyncio.gather(*map(end_of, held))
            assert {each["event"] for each in ends} == {"result"}, ends
            await waited(lambda: going.ended("ray"), "the pod ends")
        assert set(client.statuses) == {200}

    run(test)
    replace(cluster, going)


def test_a_pod_whose_grace_ends_takes_along_what_its_own_gateway_has(cluster: Cluster) -> None:
    """And nothing else: documents of the other pod's gateway go on there."""
    going, staying = cluster.workers

    async def test() -> None:
        client = Client(cluster, staying)
        async with client.holding(12) as held:
            kept = metric(staying, "gma_documents_in_flight")
            assert 0 < kept < len(held)
            going.terminate("ray")
            for _ in range(5):
                for each in held:
                    await each.send(PIECE)
                await asyncio.sleep(1)
            assert not going.ended("ray")
            going.kill()
            ends = await asyncio.gather(*map(end_of, held), return_exceptions=True)
            answered = [each for each in ends if not isinstance(each, BaseException)]
            assert [each["event"] for each in answered] == ["result"] * int(kept), ends
            sizes = {each["usage"]["bytes"] for each in answered}
            assert sizes == {7 * len(PIECE)}

    run(test)
    replace(cluster, going)
