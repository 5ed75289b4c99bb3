"""How a gateway hears from Ray Serve where workers are."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.serve.exceptions import DeploymentUnavailableError

from gma.service.link import replicas
from gma.service.link.remote import Address
from gma.service.link.replicas import Replicas


class Asked:
    """One replica's answer to be."""

    def __init__(self, answer: object) -> None:
        self._answer = answer

    async def get_async(self) -> object:
        if isinstance(self._answer, Exception):
            raise self._answer
        if self._answer is None:
            await asyncio.Event().wait()
        return self._answer


class Handle:
    """A deployment's, whose replicas a test chooses: None is one that hangs."""

    def __init__(self, *answers: object) -> None:
        self._answers = answers

    def broadcast(self, method: str) -> Handle:
        assert method == "address"
        return self

    async def _fetch_replica_results_async(self) -> list[Any]:
        if not self._answers:
            raise DeploymentUnavailableError(None)  # type: ignore[arg-type]
        return [Asked(answer) for answer in self._answers]


def look(*answers: object) -> list[Address | None]:
    handle: Any = Handle(*answers)
    return asyncio.run(Replicas(handle).look())


def test_each_says_where_it_is() -> None:
    assert look(["a:1", "x"], ("b:2", "y")) == [Address("a:1", "x"), Address("b:2", "y")]


def test_there_may_be_none() -> None:
    assert look() == []


def test_one_that_hangs_or_is_lost_hides_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "ANSWER_S", 0.05)
    assert look(None, ("b:2", "y"), RuntimeError("died")) == [None, Address("b:2", "y"), None]
