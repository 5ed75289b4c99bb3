"""Batches from Python, to a real service."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from gma import Answer, AsyncClient, Client, ServiceError
from tests.service.asgi import TEXT
from tests.service.client.served import Scripted, refused

Begin = Callable[[Scripted], Client]


def test_each_is_answered(client: Client) -> None:
    texts = ["a", TEXT, "Ça va?"]
    told = list(client.batch(texts, in_order=True, top_k=2))
    assert [name for name, _ in told] == [1, 2, 3]
    for text, (_, answer) in zip(texts, told, strict=True):
        assert isinstance(answer, Answer)
        alone = client.classify(text, top_k=2)
        assert (answer.label, answer.tokens) == (alone.label, alone.tokens)
        assert len(answer.scores) == 2


def test_ids_options_and_errors(client: Client) -> None:
    items: list[dict[str, Any]] = [
        {"id": "good", "text": "a", "top_k": 1},
        {"id": "empty", "text": ""},
        {"id": "wrong", "text": "a", "option": 1},
        {"id": 7, "text": "b"},
    ]
    told = dict(client.batch(items))
    assert told.keys() == {"good", "empty", "wrong", 7}
    good, empty, wrong = told["good"], told["empty"], told["wrong"]
    assert isinstance(good, Answer)
    assert len(good.scores) == 1
    assert isinstance(empty, ServiceError)
    assert (empty.status, empty.error_type) == (400, "Empty")
    assert isinstance(wrong, ServiceError)
    assert (wrong.status, str(wrong)) == (422, "option is unknown")


def test_answers_come_while_documents_do(client: Client) -> None:
    asked = threading.Semaphore(0)

    def one_after_the_other() -> Iterator[str]:
        while True:  # until nobody wants more
            assert asked.acquire(timeout=30)
            yield "a"

    asked.release()
    for number, (name, _) in enumerate(client.batch(one_after_the_other()), 1):
        assert name == number
        asked.release()
        if number == 5:
            break
    assert client.classify("a").label


@pytest.mark.anyio
async def test_from_asyncio(url: str) -> None:
    async def texts() -> AsyncIterator[str]:
        for _ in range(200):
            yield "a"

    async with AsyncClient(url) as client:
        names = [name async for name, _ in client.batch(texts())]
    assert sorted(map(int, names)) == list(range(1, 201))


def test_nothing(client: Client) -> None:
    assert list(client.batch([])) == []


@pytest.mark.parametrize("documents", ["a text", b"bytes", {"text": "a"}])
def test_what_is_no_batch(client: Client, documents: Any) -> None:
    with pytest.raises(TypeError, match="put one into a list"):
        list(client.batch(documents))


def test_what_is_said_of_the_batch_is_raised(scripted: Begin) -> None:
    client = scripted(Scripted(refused(429, "Overloaded")))
    with pytest.raises(ServiceError) as raised:
        list(client.batch(["a"]))
    assert raised.value.status == 429
