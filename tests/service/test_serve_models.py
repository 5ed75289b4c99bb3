"""`gma serve` with several models, which are added, replaced and removed under load."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest

from gma import Classifier
from tests.service.asgi import TEXT, save_checkpoint
from tests.service.running import PLAIN, Connection, free_port
from tests.service.test_serve import Served

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

PATIENCE_S = 300

LONG = TEXT * 12  # more than a chunk in either half

LAYERS = {"a": 1, "b": 2, "c": 3, "d": 4}
"""Of each checkpoint, so that their answers differ."""

MANY = 24
"""Answers of several connections, which are with either gateway."""


class Site:
    """The service, its file of models, and a client of each that asks again and again."""

    def __init__(self, folder: Path, temporary: Path) -> None:
        self.folder = folder
        self.logits = {}
        for name, layers in LAYERS.items():
            checkpoint = save_checkpoint(folder / name, layers=layers)
            self.logits[name] = Classifier.load(checkpoint).classify(LONG).scores[0].logit
        self.write(one="a", two="b")
        self.port = free_port()
        self.served = Served(folder, temporary, self.port, "GMA_MODELS=models.toml")
        self.answers: dict[str, list[str]] = {"one": [], "two": []}
        """Of each model's client: which checkpoint answered, or the status of an error."""
        self.healths: list[int] = []
        self._end = threading.Event()

    def write(self, text: str | None = None, **models: str) -> None:
        """Replace the file: models and their checkpoints, or whatever it is to say."""
        tables = [f'[{name}]\ncheckpoint = "{each}"\n' for name, each in models.items()]
        new = self.folder / "models.new"
        new.write_text(text or "".join(tables))
        new.rename(self.folder / "models.toml")

    def checkpoint(self, logit: float) -> str:
        """Which gives the text that logit as its best."""
        name = min(self.logits, key=lambda each: abs(self.logits[each] - logit))
        assert self.logits[name] == pytest.approx(logit, rel=1e-3)
        return name

    def ask(self, http: httpx.Client, model: str) -> str:
        response = http.post(
            f"{self.served.url}/v1/documents", content=LONG, headers=PLAIN, params={"model": model}
        )
        if response.status_code != 200:
            return str(response.status_code)
        return self.checkpoint(response.json()["scores"][0]["logit"])

    def client(self, model: str) -> None:
        while not self._end.is_set():
            with httpx.Client(trust_env=False, timeout=PATIENCE_S) as http:
                self.answers[model] += [self.ask(http, model) for _ in range(3)]
                self.healths.append(http.get(f"{self.served.url}/health").status_code)

    @contextmanager
    def under_load(self) -> Iterator[None]:
        with ThreadPoolExecutor(len(self.answers)) as threads:
            clients = [threads.submit(self.client, model) for model in self.answers]
            try:
                yield
            finally:
                self._end.set()
            for each in clients:
                each.result()

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, self.served.errors.read_text()[-5000:]

    def until_answered(self, model: str, answer: str) -> None:
        """Wait until a model's client gets nothing else."""
        self.until(lambda: set(self.answers[model][-MANY:]) == {answer})

    def versions(self, model: str) -> set[str]:
        """Those of a model's workers whose processes are there."""
        names = "\n".join(self.served.processes().values())
        return set(re.findall(rf"gma-model-{model}-(\d+):Worker", names))

    async def read_slowly(self, model: str, meanwhile: Callable[[], None]) -> str:
        """The checkpoint that reads a document of which half comes before, and half after."""
        path, data = f"/v1/models/{model}/documents", LONG.encode()
        async with Connection.open(self.port, "application/x-ndjson", path=path) as upload:
            await upload.send(data[: len(data) // 2])
            assert (await upload.event(seconds=PATIENCE_S))["event"] == "progress"
            await asyncio.to_thread(meanwhile)
            await upload.send(data[len(data) // 2 :], last=True)
            line = await upload.line_with(b'{"event":"result"', seconds=PATIENCE_S)
        found = re.search(rb'"logit":([-.e0-9]+)', line)
        assert found
        return self.checkpoint(float(found[1]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("GMA_IDLE_TIMEOUT_S", str(2 * PATIENCE_S))  # a document waits meanwhile
    with TemporaryDirectory(prefix="t-", dir="/tmp") as temporary:
        site = Site(tmp_path, Path(temporary))
        try:
            yield site
        finally:
            site.served.end()


def test_models_come_and_go_and_nobody_sees_an_error(site: Site) -> None:
    def replace() -> None:
        site.write(one="a", two="d", three="c")
        site.until_answered("two", "d")

    def break_the_file() -> None:
        site.write("nonsense")
        site.until(lambda: "can't be used" in site.served.errors.read_text())
        site.write(one="nowhere", two="d", three="c")
        site.until(lambda: "the model one can't be used" in site.served.errors.read_text())

    with httpx.Client(trust_env=False, timeout=PATIENCE_S) as http, site.under_load():
        site.until(lambda: len(site.answers["one"]) > MANY < len(site.answers["two"]))

        site.write(one="a", two="b", three="c")
        site.until(lambda: site.ask(http, "three") == "c")

        # It goes on at the version that it began with, which ends no sooner.
        assert asyncio.run(site.read_slowly("two", replace)) == "b"
        site.until(lambda: site.versions("two") == {"2"})

        break_the_file()
        site.write(two="d", three="c")
        site.until_answered("one", "404")
        site.until(lambda: not site.versions("one"))
        metrics = http.get(f"{site.served.url}/metrics").text
        assert 'gma_model_changes_total{result="refused"} 2.0' in metrics
        assert 'gma_model_changes_total{result="taken"} 2.0' in metrics
        done = set(re.findall(r'gma_documents_total{model="(\w+)",outcome="done"}', metrics))
        assert done == {"one", "two", "three"}

    assert set(site.healths) == {200}
    # Two gateways learn of a change at different times, and no answer is anything else.
    assert set(site.answers["two"]) == {"b", "d"}
    assert set(site.answers["one"]) == {"a", "404"}
