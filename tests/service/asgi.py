"""A client that speaks ASGI to the service by hand, and a service that it can hold."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import torch
from starlette.types import ASGIApp, Message

from gma.model import weights
from gma.model.classifier import Classifier
from gma.model.config import ModelConfig
from gma.model.tokenizer import Tokenizer
from gma.service.engine.opening import Opening
from gma.service.engine.step import Batch, Launched
from gma.service.gateway.gateway import Gateway
from gma.service.gateway.model import Model, Models
from gma.service.http.app import create_app
from gma.service.link.client import OpenDocument
from gma.service.model_folder import ModelFolder
from gma.service.runners.torch import TorchRunner
from gma.service.settings import Settings
from gma.service.worker import Worker

PATIENCE_S = 30  # for what comes at once unless something is broken

LABELS = ("ann", "bob", "cyd")
TEXT = (
    "Ça va bien, merci. 漢字も読める。 The sea was calm, and nobody spoke of the 41 ships 🚢. " * 3
)


def save_checkpoint(
    folder: Path, text: str = TEXT, *, vocab_size: int = 300, **changes: Any
) -> Path:
    """A tiny checkpoint whose weights are random, so that labels and spans differ.

    `text`: what its tokenizer is made of.
    """
    tokenizer = Tokenizer.train(iter([text]), vocab_size=vocab_size)
    config = ModelConfig(
        name="tiny",
        labels=LABELS,
        vocab_size=tokenizer.vocab_size,
        **{
            "width": 16,
            "layers": 2,
            "heads": 2,
            "routing_dim": 4,
            "value_dim": 8,
            "num_components": 4,
            "mlp_width": 16,
            "prior_tokens": 20.0,
            **changes,
        },
    )
    torch.manual_seed(0)
    classifier = Classifier(config)
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights.save(folder, classifier, tokenizer, card="# tiny")
    return folder


class HeldRunner(TorchRunner):
    """A runner whose steps wait, or fail, when a test says so."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stepping = threading.Semaphore(0)  # released when a step begins
        self.go = threading.Event()
        self.go.set()
        self.fails = False
        self.warm = False

    def warm_up(self) -> None:
        super().warm_up()
        self.warm = True

    def launch(self, batch: Batch) -> Launched:
        if self.warm:
            self.stepping.release()
            assert self.go.wait(PATIENCE_S)
            if self.fails:
                raise RuntimeError("the device is on fire")
        return super().launch(batch)

    def release(self) -> None:
        """Let all steps go on, and none fail."""
        self.fails = False
        self.go.set()

    def hold(self) -> None:
        """Let no step go on, and wait for none that has begun."""
        self.go.clear()
        self.forget_steps()

    def forget_steps(self) -> None:
        """Wait for none that has begun."""
        while self.stepping.acquire(blocking=False):
            pass

    async def step_begun(self) -> None:
        """Wait until a step that nobody waited for yet has begun."""
        assert await asyncio.to_thread(self.stepping.acquire, timeout=PATIENCE_S)


class LocalWorkers:
    """A worker in this process, as a gateway sees workers: a `WorkerClient`."""

    count = 1

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.info = worker.info

    async def open(self, opening: Opening) -> OpenDocument:
        return self._worker.engine.open(opening)


class Service:
    """A gateway and a worker in this process."""

    def __init__(
        self, checkpoint: Path, clock: Callable[[], float] = time.time, /, **settings: Any
    ) -> None:
        """`clock`: by which sessions expire."""
        self.settings = Settings.load(
            checkpoint=checkpoint,
            **{"rows": 2, "chunk_tokens": 8, "slots": 4, "threads": 1, **settings},
        )
        loaded = weights.load(checkpoint)
        self.tokenizer = loaded.tokenizer
        self.runner = HeldRunner(
            loaded.classifier,
            slots=self.settings.slots,
            rows=self.settings.rows,
            chunk=self.settings.chunk_tokens,
        )
        name, fingerprint = loaded.config.name, loaded.fingerprint
        self.worker = Worker(self.runner, self.settings, fingerprint=fingerprint, name=name)
        self.model = Model(loaded.config, loaded.tokenizer, LocalWorkers(self.worker))
        self.gateway = Gateway(self.settings, Models(self.model))
        self.app: ASGIApp = create_app(self.gateway, clock=clock)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://service", timeout=PATIENCE_S
        )

    async def __aenter__(self) -> Self:
        # More would fight over the cores, and a tiny model gains nothing from them.
        self._threads = torch.get_num_threads()
        torch.set_num_threads(self.settings.threads)
        await self.worker.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.runner.go.set()
        await self.worker.stop()
        await self.http.aclose()
        torch.set_num_threads(self._threads)

    async def classify(self, text: str | bytes, **parameters: Any) -> dict[str, Any]:
        """The answer to a text in one piece."""
        response = await self.http.post(
            "/v1/documents",
            content=text,
            params=parameters,
            headers={"content-type": "text/plain"},
        )
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def metric(self, name: str) -> float:
        """The sum of a metric whatever its labels, as Prometheus scrapes it."""
        text = (await self.http.get("/metrics")).text
        found = re.findall(rf"^{name}(?:{{.*}})? (.+)$", text, re.MULTILINE)
        assert found, name
        return sum(map(float, found))

    async def until(self, name: str, value: float) -> None:
        """Wait until a metric has a value."""
        async with asyncio.timeout(PATIENCE_S):
            while await self.metric(name) != value:
                pass


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """The service in this process, made of its settings as its own processes are."""
    worker = Worker.load(settings)
    folder = ModelFolder.of(settings)
    model = Model(folder.config, Tokenizer.load(folder.tokenizer), LocalWorkers(worker))
    gateway = Gateway(settings, Models(model))
    transport = httpx.ASGITransport(create_app(gateway))
    await worker.start()
    try:
        async with httpx.AsyncClient(
            transport=transport, base_url="http://service", timeout=PATIENCE_S
        ) as client:
            yield client
    finally:
        await worker.stop()


class Exchange:
    """One request, piece by piece, and its answer as it comes."""

    def __init__(
        self,
        app: ASGIApp,
        path: str,
        headers: Mapping[str, str],
        *,
        method: str = "POST",
        reads: bool = True,
    ) -> None:
        """`reads`: take what the service sends, which else waits."""
        path, _, query = path.partition("?")
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("service", 80),
        }
        self._app = app
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._from_app: asyncio.Queue[Message] = asyncio.Queue(0 if reads else 1)

    async def __aenter__(self) -> Self:
        call = self._app(self.scope, self._to_app.get, self._from_app.put)
        self._call = asyncio.ensure_future(call)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.cancel()
        await asyncio.wait({self._call})

    def send(self, body: bytes, *, last: bool = False) -> None:
        self._to_app.put_nowait({"type": "http.request", "body": body, "more_body": not last})

    def leave(self) -> None:
        """The client closes the connection."""
        self._to_app.put_nowait({"type": "http.disconnect"})

    async def finished(self) -> None:
        """Wait until the service has nothing more to do for this request."""
        await asyncio.wait_for(asyncio.shield(self._call), PATIENCE_S)

    @property
    def answered(self) -> bool:
        return not self._from_app.empty()

    async def message(self) -> Message:
        return await asyncio.wait_for(self._from_app.get(), PATIENCE_S)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the answer."""
        message = await self.message()
        assert message["type"] == "http.response.start"
        return message["status"], {k.decode(): v.decode() for k, v in message["headers"]}

    async def json(self) -> Any:
        """The body of an answer in one piece."""
        message = await self.message()
        assert not message.get("more_body")
        return json.loads(message["body"])

    async def event(self) -> dict[str, Any]:
        """The next event of an NDJSON answer."""
        message = await self.message()
        (line,) = message["body"].decode().splitlines()
        event: dict[str, Any] = json.loads(line)
        assert message["more_body"] == (event["event"] == "progress")
        return event

    async def events(self) -> list[dict[str, Any]]:
        """All that are still to come."""
        events = [await self.event()]
        while events[-1]["event"] == "progress":
            events.append(await self.event())
        return events
