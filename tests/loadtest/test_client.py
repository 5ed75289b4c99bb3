"""One client against a server whose behaviour is known: above all, that it tells the truth."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from gma.loadtest import client
from gma.loadtest.arrivals import arrivals
from gma.loadtest.client import Client, Outcome, Plan
from gma.loadtest.corpus import Corpus
from gma.loadtest.slo import quantile
from tests.loadtest.server import Server

STALL_S = 1.0


def send(server: Server, late_s: float = 0.0, **changes: Any) -> list[Outcome]:
    """Carry out a plan that began `late_s` seconds ago."""
    given: dict[str, Any] = {
        "url": server.url,
        "corpus": None,
        "lengths": "fixed:300",
        "seed": 0,
        "first": 0,
        "step": 1,
        "dues": [0.0, 0.01, 0.02],
        "at_once": 0,
        "seconds": 0.0,
        "ndjson": False,
        "timeout_s": 30.0,
    }
    plan = Plan(**(given | changes))
    corpus = Corpus.load(None, plan.lengths, plan.seed)
    return asyncio.run(Client(plan, corpus).run(time.monotonic() - late_s))


def p99(outcomes: list[Outcome]) -> float:
    found = quantile([outcome.seconds for outcome in outcomes], 0.99)
    assert found is not None
    return found


class TestAStalledServer:
    """It answers nothing for a second, once."""

    @pytest.fixture(autouse=True)
    def _stall(self, server: Server) -> None:
        server.stall_after, server.stall_s = 20, STALL_S

    @pytest.mark.parametrize("connections", [client.MOST_CONNECTIONS, 1])
    @pytest.mark.parametrize(
        "profile", ["poisson", pytest.param("constant", marks=pytest.mark.long)]
    )
    def test_is_seen_by_an_open_loop(
        self, server: Server, monkeypatch: pytest.MonkeyPatch, profile: str, connections: int
    ) -> None:
        """Nor is it forgiven by a client that has no connection free."""
        monkeypatch.setattr(client, "MOST_CONNECTIONS", connections)
        outcomes = send(server, dues=arrivals(profile, 60, 1.5))
        assert not any(outcome.error for outcome in outcomes)
        assert p99(outcomes) > 0.8 * STALL_S
        # All that came meanwhile waited, each as long as was left of it.
        waited = [outcome for outcome in outcomes if outcome.seconds > STALL_S / 2]
        assert len(waited) > 60 * STALL_S / 2 * 0.6

    def test_is_hidden_by_a_closed_loop(self, server: Server) -> None:
        outcomes = send(server, dues=[], at_once=1, seconds=2.0)
        assert max(outcome.seconds for outcome in outcomes) > 0.8 * STALL_S
        assert sum(outcome.seconds > STALL_S / 2 for outcome in outcomes) == 1
        assert p99(outcomes) < STALL_S / 2


def test_a_late_client_does_not_make_the_server_look_fast(server: Server) -> None:
    for outcome in send(server, late_s=2.0):
        assert outcome.sent - outcome.due > 1.9
        assert outcome.seconds > 1.9


def test_sends_its_share_of_the_documents(server: Server) -> None:
    outcomes = send(server, first=1, step=3)
    corpus = Corpus.load(None, "fixed:300")
    assert sorted(server.bodies) == sorted(corpus.document(i) for i in (1, 4, 7))
    assert [outcome.bytes for outcome in outcomes] == [300] * 3
    assert [outcome.tokens for outcome in outcomes] == [75] * 3
    assert outcomes[0].timing_ms == {"queue": 2.0, "total": 3.0}


def test_a_closed_loop_keeps_so_many_in_flight(server: Server) -> None:
    server.status = 0
    outcomes = send(server, dues=[], at_once=3, seconds=0.3, timeout_s=0.5)
    assert len(outcomes) == len(server.bodies) == 3
    assert {outcome.error for outcome in outcomes} == {"timeout"}


@pytest.mark.parametrize("ndjson", [False, True])
def test_speaks_plain_and_ndjson(server: Server, ndjson: bool) -> None:
    outcomes = send(server, ndjson=ndjson, key="a key")
    for outcome, headers in zip(outcomes, server.headers, strict=True):
        assert outcome.error is None
        assert outcome.tokens == 75
        assert outcome.first is not None
        assert outcome.sent <= outcome.first <= outcome.ended
        assert headers["authorization"] == "Bearer a key"
        assert headers["content-type"].startswith("text/plain")
        assert (headers["accept"] == "application/x-ndjson") == ndjson


class TestErrors:
    def kinds(self, server: Server, **changes: Any) -> set[str | None]:
        return {outcome.error for outcome in send(server, **changes)}

    @pytest.mark.parametrize("status", [429, 503, 413, 500])
    def test_status(self, server: Server, status: int) -> None:
        server.status = status
        assert self.kinds(server) == {str(status)}

    def test_no_answer_in_time(self, server: Server) -> None:
        server.status = 0
        assert self.kinds(server, timeout_s=0.2) == {"timeout"}

    def test_an_answer_to_less_than_was_sent(self, server: Server) -> None:
        server.answer = {"usage": {"bytes": 299, "tokens": 75}}
        assert self.kinds(server) == {"not all was read"}

    def test_an_answer_that_is_none(self, server: Server) -> None:
        server.answer = {"usage": None}
        assert self.kinds(server) == {"no answer"}

    def test_error_event(self, server: Server) -> None:
        server.error_event = "Overloaded"
        assert self.kinds(server, ndjson=True) == {"event: Overloaded"}

    def test_no_server(self, server: Server) -> None:
        assert self.kinds(server, url="http://127.0.0.1:9") == {"connection refused"}
