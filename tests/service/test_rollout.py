"""Models that are added, replaced and removed: in which order, and what a failure changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from gma.service.app.application import Application
from gma.service.app.models_file import Wanted
from gma.service.app.rollout import Fate, Rollout
from gma.service.app.start import StartError
from gma.service.link.workers import FORGOTTEN_S
from gma.service.settings import Settings

OLD, NEW = Application("a", 1), Application("a", 2)


class Fake:
    """Applications that do as a test says; and the rollout that deals with them, and its clock."""

    def __init__(self) -> None:
        self.there: dict[Application, Fate] = {}
        self.life: list[str] = []
        self.refuses: str | None = None
        self.now = 0.0
        self.changes: list[str | None] = []
        self.rollout = Rollout(self, lambda: self.now, FORGOTTEN_S, self.changed)

    def changed(self, error: StartError | None) -> None:
        self.changes.append(str(error) if error else None)

    def start(self, application: Application, settings: Settings) -> None:
        if self.refuses:
            raise StartError(self.refuses)
        self.life.append(f"start {application}")
        self.there[application] = "starting"

    def fates(self) -> dict[Application, Fate]:
        return self.there

    def end(self, application: Application) -> None:
        self.life.append(f"end {application}")
        del self.there[application]

    def step(self, seconds: float = 0.0, **models: str) -> list[str]:
        """What a step does towards these models, each in a folder."""
        self.now += seconds
        self.life.clear()
        self.rollout.step({name: wanted(folder) for name, folder in models.items()})
        return [*self.life]

    def runs(self, application: Application) -> None:
        self.there[application] = "running"


def wanted(folder: str) -> Wanted:
    return Wanted(Settings.load(checkpoint=Path(folder)), ())


@pytest.fixture
def fake() -> Fake:
    """With the version OLD of the model a, from the folder x, running."""
    fake = Fake()
    assert fake.step(a="x") == ["start gma-model-a-1"]
    starting = [fake.rollout.starting]
    fake.runs(OLD)
    assert fake.step(a="x") == []
    assert [*starting, fake.rollout.starting] == [True, False]
    assert fake.changes == [None]
    return fake


def test_what_stays_is_left_alone(fake: Fake) -> None:
    assert fake.step(100, a="x") == []


def test_what_never_was_is_not_removed(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    fake.refuses = "no such folder"
    fake.step(a="x", b="nowhere")
    assert fake.step(a="x") == []
    assert "removed" not in caplog.text


def test_one_is_added_beside_the_others(fake: Fake) -> None:
    assert fake.step(a="x", b="x") == ["start gma-model-b-1"]
    assert set(fake.there) == {OLD, Application("b", 1)}


def test_one_is_removed(fake: Fake) -> None:
    assert fake.step(b="x") == ["end gma-model-a-1", "start gma-model-b-1"]


def test_the_old_version_ends_once_gateways_know_the_new_one(fake: Fake) -> None:
    assert fake.step(a="y") == ["start gma-model-a-2"]
    assert fake.step(100, a="y") == []
    fake.runs(NEW)
    assert fake.step(a="y") == []
    assert fake.step(FORGOTTEN_S / 2, a="y") == []
    assert fake.step(FORGOTTEN_S / 2, a="y") == ["end gma-model-a-1"]
    assert fake.step(100, a="y") == []
    assert set(fake.there) == {NEW}


def test_other_files_in_the_same_folder_are_another_version(fake: Fake) -> None:
    changed = wanted("x")._replace(files=(("model.safetensors", (1, 2, 3, 4)),))
    fake.rollout.step({"a": changed})
    assert set(fake.there) == {OLD, NEW}


def test_one_that_fails_changes_nothing_and_is_not_tried_again(fake: Fake) -> None:
    fake.step(a="y")
    fake.there[NEW] = StartError("no such weights")
    assert fake.step(a="y") == ["end gma-model-a-2"]
    assert {name: str(x) for name, x in fake.rollout.refused.items()} == {"a": "no such weights"}
    assert fake.step(100, a="y") == []
    assert fake.changes == [None, "no such weights"]
    assert set(fake.there) == {OLD}
    assert fake.step(a="z") == ["start gma-model-a-3"]
    assert fake.step(a="z") == []
    assert fake.rollout.refused == {}


def test_one_that_cannot_be_started(fake: Fake) -> None:
    fake.refuses = "no GPU is free"
    assert fake.step(a="y") == fake.step(a="y") == []
    assert fake.changes == [None, "no GPU is free"]
    assert set(fake.there) == {OLD}
    fake.refuses = None
    assert fake.step(a="x") == []
    assert fake.rollout.refused == {}
    assert fake.step(a="y") == ["start gma-model-a-2"]


def test_a_change_while_another_starts_takes_its_place(fake: Fake) -> None:
    fake.step(a="y")
    assert fake.step(a="z") == ["end gma-model-a-2", "start gma-model-a-3"]
    assert set(fake.there) == {OLD, Application("a", 3)}


def test_a_change_that_is_taken_back_ends_what_it_started(fake: Fake) -> None:
    fake.step(a="y")
    assert fake.step(a="x") == ["end gma-model-a-2"]
    assert set(fake.there) == {OLD}


def test_a_change_that_is_taken_back_later_is_another_one(fake: Fake) -> None:
    fake.step(a="y")
    fake.runs(NEW)
    fake.step(a="y")
    assert fake.step(a="x") == ["start gma-model-a-3"]
    fake.runs(Application("a", 3))
    fake.step(a="x")
    assert fake.step(FORGOTTEN_S, a="x") == ["end gma-model-a-1", "end gma-model-a-2"]
