"""The models that a gateway finds: each is an application of Serve, of workers alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress

from ray import serve

from gma.model.config import ModelConfig
from gma.model.tokenizer import Tokenizer
from gma.service.app.application import WORKER, Application
from gma.service.gateway.model import Model, Models
from gma.service.link.client import ModelFiles
from gma.service.link.remote import Address, RemoteWorker
from gma.service.link.replicas import Replicas
from gma.service.link.workers import LOOK_S, RemoteWorkers

logger = logging.getLogger(__name__)

AGAIN_S = 0.1
"""How long until a gateway that has just begun looks again."""

READY = ("RUNNING", "UNHEALTHY")
"""Of Serve's statuses those of applications that have been ready."""

DELETING = "DELETING"
GONE = (DELETING, "DEPLOY_FAILED")


def statuses() -> dict[Application, str]:
    """Serve's of each version of each model."""
    told = {Application.parsed(name): each for name, each in serve.status().applications.items()}
    return {application: each.status.value for application, each in told.items() if application}


def is_there(told: Mapping[Application, str], application: Application) -> bool:
    """Whether new documents may still be given to it."""
    return told.get(application, DELETING) != DELETING


def chosen(told: Mapping[Application, str], known: Iterable[Application]) -> set[Application]:
    """The versions by which new documents are to be read: of each model the highest that has been
    ready, whatever became of it since, as long as it is there."""
    there = {each for each, status in told.items() if status in READY}
    there |= {each for each in known if is_there(told, each)}
    newest: dict[str, Application] = {}
    for each in sorted(there):
        newest[each.model] = each
    return {*newest.values()}


class FoundModels(Models):
    """The models that Serve has at present."""

    def __init__(self, *, timeout_s: float) -> None:
        """`timeout_s`: how long to wait for a worker, in all."""
        super().__init__()
        self._timeout_s = timeout_s
        self._found: dict[str, Found] = {}
        self._replicas: dict[Application, Replicas] = {}

    async def begin(self) -> None:
        """Return when all that are ready are known, or can't be reached: nobody should be answered
        that there are none because this process is new."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                known = await self.look()
                while not known:
                    await asyncio.sleep(AGAIN_S)
                    known = await self.look()

    async def keep(self) -> None:
        """Look for them again and again, for as long as this runs."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> bool:
        """From now on there are those that Serve has now. Returns whether all of them are known."""
        try:
            told = await asyncio.to_thread(statuses)
        except Exception:
            logger.warning("looking for models failed", exc_info=True)
            return False
        before = self._found
        known = {each.application for each in before.values() if not each.replaced}
        made = await asyncio.gather(*map(self._made, chosen(told, known) - known))
        # What there was stays until there is better.
        found = {name: each for name, each in before.items() if is_there(told, each.application)}
        found |= {each.application.model: each for each in made if each}
        for name, each in before.items():
            if found.get(name) is not each:
                each.retire()
        self._found = found
        starting = {each.model for each, status in told.items() if status not in GONE}
        self.replace([each.model for each in found.values()], starting)
        self._replicas = {x: each for x, each in self._replicas.items() if is_there(told, x)}
        return None not in made

    async def _made(self, application: Application) -> Found | None:
        """What is found of an application; None if none of its workers answers."""
        try:
            replicas = self._replicas.get(application)
            if replicas is None:
                name = str(application)
                handle = await asyncio.to_thread(serve.get_deployment_handle, WORKER, name)
                replicas = self._replicas[application] = Replicas(handle)
            address = next(filter(None, await replicas.look()), None)
            if address is None:
                return None
            files = await _files(address, self._timeout_s)
            config = ModelConfig.model_validate_json(files.config)
            config = config.model_copy(update={"name": application.model})
            tokenizer = await asyncio.to_thread(Tokenizer.parse, files.tokenizer)
        except Exception:
            logger.warning("%s can't be used yet", application, exc_info=True)
            return None
        logger.info("the model %s is there, version %d", *application)
        return Found(
            application, replicas, address.model, config, tokenizer, timeout_s=self._timeout_s
        )


async def _files(address: Address, timeout_s: float) -> ModelFiles:
    """Those of the model that a worker runs."""
    worker = RemoteWorker(address)
    try:
        async with asyncio.timeout(timeout_s):
            return await worker.files()
    finally:
        worker.retire()


class Found:
    """The workers of an application that run one checkpoint, and the model as they tell of it.

    Where its folder was changed, a worker that starts anew runs another: its tokens are not these.
    """

    def __init__(
        self,
        application: Application,
        replicas: Replicas,
        fingerprint: str,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        timeout_s: float,
    ) -> None:
        self.application = application
        self.replaced = False
        """All that answer run another checkpoint."""
        self._retired = False
        self._replicas = replicas
        self._fingerprint = fingerprint
        self.workers = RemoteWorkers(self._look, timeout_s=timeout_s)
        self.model = Model(config, tokenizer, self.workers)

    def retire(self) -> None:
        """Give it no new documents; those that it has go on."""
        self._retired = True
        self.workers.retire()

    async def _look(self) -> list[Address | None]:
        told = await self._replicas.look()
        own = [each for each in told if each is None or each.model == self._fingerprint]
        self.replaced = bool(told) and not own
        # Those of an application that is to go are not told, and take documents for a while. As
        # long as it is not known here that it goes, they get them.
        return own if own or self._retired else [None]
