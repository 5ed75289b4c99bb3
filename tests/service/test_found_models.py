"""How a gateway finds models among the applications of Ray Serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from ray import serve

from gma.service.app import found_models
from gma.service.app.application import WORKER, Application
from gma.service.app.found_models import FoundModels, chosen
from gma.service.errors import NotReady, UnknownModel
from gma.service.gateway.gateway import Gateway
from gma.service.http.app import create_app
from gma.service.link import workers
from gma.service.link.client import ModelFiles
from gma.service.link.remote import Address, WorkerServer
from tests.service.asgi import PATIENCE_S, TEXT, Service, save_checkpoint
from tests.service.link.test_replicas import Handle

pytestmark = pytest.mark.anyio

A1, A2, B1 = Application("a", 1), Application("a", 2), Application("b", 1)


@pytest.mark.parametrize("application", [A1, Application("a-b.c", 12), Application("a-1", 3)])
def test_a_name_says_which_version_of_which_model(application: Application) -> None:
    assert Application.parsed(str(application)) == application


@pytest.mark.parametrize("name", ["gma", "gma-model-a", "gma-model--1", "gma-model-a-x", "x-1"])
def test_other_applications_are_no_models(name: str) -> None:
    assert Application.parsed(name) is None


@pytest.mark.parametrize(
    ("told", "known", "new"),
    [
        ({}, set(), set()),
        ({A1: "RUNNING", B1: "RUNNING"}, set(), {A1, B1}),
        ({A1: "DEPLOYING"}, set(), set()),
        ({A1: "RUNNING", A2: "DEPLOYING"}, {A1}, {A1}),
        ({A1: "RUNNING", A2: "RUNNING"}, {A1}, {A2}),
        ({A1: "RUNNING", A2: "DEPLOYING"}, {A1, A2}, {A2}),  # it scales, or was seen before
        ({A1: "UNHEALTHY"}, set(), {A1}),
        ({A1: "DEPLOY_FAILED", A2: "DELETING"}, {A2}, set()),
        ({A1: "RUNNING", A2: "DELETING"}, {A2}, {A1}),
    ],
)
def test_the_highest_version_that_was_ready(
    told: dict[Application, str], known: set[Application], new: set[Application]
) -> None:
    assert chosen(told, known) == new


class Serve:
    """Applications of workers in this process, as Serve tells of them."""

    def __init__(self) -> None:
        self.status: dict[Application, str] = {}
        self.workers: dict[str, list[Address]] = {}

    def run(self, application: Application, *workers: Address, status: str = "RUNNING") -> None:
        self.status[application] = status
        self.workers[str(application)] = [*workers]

    def end(self, application: Application) -> None:
        del self.status[application], self.workers[str(application)]

    def handle(self, deployment: str, application: str) -> Any:
        assert deployment == WORKER
        there = self.workers

        class Now(Handle):
            async def _fetch_replica_results_async(self) -> list[Any]:
                self._answers = (*map(tuple, there.get(application, [])),)
                return await super()._fetch_replica_results_async()

        return Now()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Serve:
    fake = Serve()
    monkeypatch.setattr(found_models, "statuses", lambda: {**fake.status})
    monkeypatch.setattr(serve, "get_deployment_handle", fake.handle)
    monkeypatch.setattr(workers, "LOOK_S", 0.02)
    return fake


@pytest.fixture(scope="module")
async def running(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[dict[str, tuple[Service, Address]]]:
    """Two checkpoints, and where their workers answer."""
    folder = tmp_path_factory.mktemp("found")
    found = {}
    async with AsyncExitStack() as stack:
        for name, layers in (("old", 2), ("new", 1)):
            saved = save_checkpoint(folder / name, layers=layers)
            service = await stack.enter_async_context(Service(saved))
            files = ModelFiles(
                service.model.config.model_dump_json().encode(),
                (saved / "tokenizer.json").read_bytes(),
            )
            server = WorkerServer(service.worker.engine, service.worker.info, files)
            address = await server.start("127.0.0.1")
            stack.push_async_callback(server.stop)
            found[name] = service, address._replace(model=service.worker.fingerprint)
        yield found


class Site:
    """A gateway whose models are found, and what answers at it."""

    def __init__(self, running: dict[str, tuple[Service, Address]]) -> None:
        self.running = running
        self.models = FoundModels(timeout_s=PATIENCE_S)
        app = create_app(Gateway(running["old"][0].settings, self.models))
        transport = httpx.ASGITransport(app)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://service")

    def address(self, checkpoint: str) -> Address:
        return self.running[checkpoint][1]

    async def reader(self, **query: str) -> str:
        """The checkpoint that a document is read by."""
        headers = {"content-type": "text/plain"}
        response = await self.http.post(
            "/v1/documents", content=TEXT, headers=headers, params=query
        )
        assert response.status_code == 200, response.text
        (found,) = [
            name
            for name, (service, _) in self.running.items()
            if (await service.classify(TEXT))["scores"][0]["logit"]
            == pytest.approx(response.json()["scores"][0]["logit"], rel=1e-4)
        ]
        return found


@pytest.fixture
async def site(running: dict[str, tuple[Service, Address]]) -> AsyncIterator[Site]:
    site = Site(running)
    async with site.http:
        yield site


async def test_they_are_what_their_workers_say(fake: Serve, site: Site) -> None:
    fake.run(A1, site.address("old"))
    fake.run(B1, site.address("new"))
    await site.models.look()
    assert site.models.names == ["a", "b"]
    assert await site.reader(model="a") == "old"
    assert await site.reader(model="b") == "new"


async def test_one_that_starts_is_to_come(fake: Serve, site: Site) -> None:
    fake.run(A1, status="DEPLOYING")
    await site.models.look()
    with pytest.raises(NotReady):
        site.models.choose("a")
    fake.run(A1)  # it says that it runs, and nobody answers yet
    await site.models.look()
    with pytest.raises(NotReady):
        site.models.choose("a")
    fake.run(A1, site.address("old"))
    await site.models.look()
    assert await site.reader() == "old"


async def test_a_new_version_takes_over_once_it_runs(fake: Serve, site: Site) -> None:
    fake.run(A1, site.address("old"))
    await site.models.look()
    before = site.models.choose()
    for status in ("DEPLOYING", "DEPLOY_FAILED"):
        fake.run(A2, site.address("new"), status=status)
        await site.models.look()
        assert site.models.choose() is before
    fake.run(A2)
    await site.models.look()
    assert site.models.choose() is before  # of the new one nobody answers
    fake.run(A2, site.address("new"))
    await site.models.look()
    assert await site.reader() == "new"
    fake.end(A1)
    await site.models.look()
    assert await site.reader() == "new"


async def test_one_that_is_in_trouble_stays(fake: Serve, site: Site) -> None:
    fake.run(A1, site.address("old"))
    await site.models.look()
    before = site.models.choose()
    for status in ("UNHEALTHY", "DEPLOYING", "DEPLOY_FAILED"):
        fake.status[A1] = status
        await site.models.look()
        assert site.models.choose() is before


@pytest.mark.parametrize("gone", [True, False])
async def test_one_that_is_removed_takes_no_new_documents(
    fake: Serve, site: Site, gone: bool
) -> None:
    fake.run(A1, site.address("old"))
    fake.run(B1, site.address("new"))
    await site.models.look()
    if gone:
        fake.end(A1)
    else:
        fake.status[A1] = "DELETING"
    await site.models.look()
    with pytest.raises(UnknownModel):
        site.models.choose("a")
    assert await site.reader() == "new"


async def test_workers_of_another_checkpoint_get_none_before_they_are_alone(
    fake: Serve, site: Site
) -> None:
    """As when its folder was changed, and one of its workers was lost."""
    fake.run(A1, site.address("new"), site.address("old"))
    await site.models.look()
    assert {await site.reader() for _ in range(4)} == {"new"}
    fake.run(A1, site.address("old"))
    async with asyncio.timeout(PATIENCE_S):
        before = site.models.choose()
        while site.models.choose() is before:
            await site.models.look()
    assert await site.reader() == "old"


async def test_a_gateway_begins_when_it_knows_them(
    fake: Serve, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(found_models, "AGAIN_S", 0.0)
    wrong = [RuntimeError("the controller is gone")]

    def failing() -> dict[Application, str]:
        if wrong:
            raise wrong.pop()
        if not fake.status:
            fake.run(A1)  # it runs, and its worker does not answer yet
        else:
            fake.run(A1, site.address("old"))
        return {**fake.status}

    monkeypatch.setattr(found_models, "statuses", failing)
    await site.models.begin()
    assert await site.reader() == "old"


async def test_it_begins_without_those_that_do_not_answer(fake: Serve) -> None:
    fake.run(A1)
    models = FoundModels(timeout_s=0.01)
    await models.begin()
    assert models.names == ["a"]
    with pytest.raises(NotReady):
        models.choose()


async def test_it_keeps_up(fake: Serve, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = asyncio.Event()

    def replace(*models: Any) -> None:
        FoundModels.replace(site.models, *models)
        looked.set()

    monkeypatch.setattr(found_models, "LOOK_S", 0.0)
    monkeypatch.setattr(site.models, "replace", replace)
    fake.run(A1, site.address("old"))
    keeping = asyncio.create_task(site.models.keep())
    async with asyncio.timeout(PATIENCE_S):
        await looked.wait()
    keeping.cancel()
    assert await site.reader() == "old"
