"""A few kills of those that `python -m tests.attack.sessions` makes, and what its clients count."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gma import Client, ServiceError
from gma.model.reader import CHUNK
from gma.service.client.error import ConnectionLost
from gma.service.client.loop import Loop
from tests.attack import sessions
from tests.service.asgi import Service, save_checkpoint
from tests.service.client.served import served

RIGHT: dict[str, Any] = {
    "store": "directory",
    "requests": 1000,
    "outcomes": {"answered": 1000},
    "acknowledged bytes lost": 0,
    "wrong": [],
    "given up": [],
    "not replaced": [],
}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("store", sessions.STORES)
def test_nothing_is_lost(store: str) -> None:
    if store == "redis" and not shutil.which("redis-server"):
        pytest.skip("needs redis-server")
    assert sessions.failures(sessions.run(4, seed=1, store=store)) == []


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    loop = Loop()
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    service = Service(checkpoint, sessions=tmp_path / "sessions", chunk_tokens=CHUNK)
    loop.call(service.__aenter__())
    with served(service.app, loop) as url:
        yield url
    loop.call(service.__aexit__())
    loop.close()


def test_clients_count_what_they_see(url: str, tmp_path: Path) -> None:
    clients = sessions.Clients(url, tmp_path / "checkpoint")
    with clients.running():
        clients.compared(10)
    seen = clients.seen
    assert (seen.wrong, seen.given_up, seen.lost) == ([], [], 0)
    assert seen.acknowledged > 0
    assert seen.requests.keys() == {"answered"}


def test_what_is_lost_or_wrong_is_counted(url: str, tmp_path: Path) -> None:
    clients = sessions.Clients(url, tmp_path / "checkpoint")
    with Client(url) as client:
        session = client.session()
        answer = session.append("The sea.")
        for data in (b"The sea was calm, ", b"The sea."):
            clients.look(client, sessions.Written(session, data))
        clients.look(client, sessions.Written(session, b"The"))
    seen = clients.seen
    assert (answer.bytes, seen.lost) == (8, 10)
    assert seen.wrong == ["ann after 18 bytes", "offset 8, not 3", "ann after 3 bytes"]


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (ServiceError("", 503, retry_after_s=1), "503"),
        (ServiceError("", 500, "StepFailed"), "unexpected 500 StepFailed"),
        (ServiceError("", 409), "409"),
        (ServiceError("", 404, "UnknownSession"), "unexpected 404 UnknownSession"),
        (ConnectionLost(""), "lost"),
    ],
)
def test_outcomes(error: ServiceError | ConnectionLost, what: str) -> None:
    assert sessions.outcome("PATCH", error) == what


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({}, []),
        ({"outcomes": {"answered": 989, "503": 10, "409": 1}}, []),
        ({"outcomes": {"answered": 989, "503": 11}}, ["1.10% of requests failed"]),
        ({"outcomes": {"answered": 999, "409": 1}}, ["409 without a reason"]),
        ({"outcomes": {"unexpected 500 x": 1}}, ["1 unexpected 500 x"]),
        ({"acknowledged bytes lost": 2}, ["2 acknowledged bytes lost"]),
        ({"wrong": ["w"], "given up": ["g"], "not replaced": ["r"]}, ["w", "g", "r"]),
    ],
)
def test_failures_are_told(found: dict[str, Any], told: list[str]) -> None:
    report = RIGHT | found
    assert sessions.failures(report) == told
    assert sessions.table(report).count("\n") == 2 + len(report)
