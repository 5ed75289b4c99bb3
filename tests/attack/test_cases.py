"""Each case has its answer, and harms nobody else."""

from __future__ import annotations

import logging
from contextlib import ExitStack, suppress

import h11
import pytest

from gma.service.http.connection import Limits
from gma.service.http.wire import EVENTS_AT_ONCE, Wire
from tests.attack.cases import CASES, CHUNKED, MEGABYTE, Case
from tests.attack.client import Raw, Reply
from tests.attack.honest import HONEST, LARGE, head
from tests.attack.target import Target
from tests.service.answers import same


def check_answer(attacked: Target, reply: Reply | None, status: int) -> Reply:
    assert reply is not None, "the connection was closed"
    assert reply.status == status, reply.body
    assert "x-request-id" in reply.headers
    if status == 200 and reply.json() != {"status": "ok"}:
        assert same(reply.json(), attacked.right)
    return reply


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(attacked: Target, case: Case, caplog: pytest.LogCaptureFixture) -> None:
    port = attacked.port(case.limits)
    with Raw(port) as client:
        with suppress(ConnectionError):  # the service need not take all of it
            for segment in case.segments:
                client.send(segment)
                attacked.settle()
            if case.ends:
                client.end()
        reply = None
        for status in case.answers:
            reply = check_answer(attacked, client.reply(), status)
        if reply and case.error:
            assert reply.json()["error_type"] == case.error
            assert len(reply.body) < 500
            assert ("connection" in reply.headers) == case.closed
        if case.closed:
            assert client.reply() is None
        else:
            client.send(HONEST)
            check_answer(attacked, client.reply(), 200)
    attacked.check(port)
    assert [r for r in caplog.records if r.levelno > logging.INFO] == []


def test_an_answer_before_the_body_says_that_it_is_the_last(attacked: Target) -> None:
    with Raw(attacked.port()) as client:
        client.send(head("Content-Length: 50", method="GET", path="/health"))
        reply = check_answer(attacked, client.reply(), 200)
        assert reply.headers["connection"] == "close"
        assert client.reply() is None


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (head("a: " + "b" * 40_000), "the request's headers have more than 32768 bytes in all"),
        (head(*["a: b"] * 101), "the request has more than 100 headers"),
        (head(CHUNKED) + b"1;" + MEGABYTE, "the request's line before a chunk has more than"),
        (head(CHUNKED) + b"0\r\na: " + MEGABYTE, "the request's trailers have more than"),
        (head(CHUNKED) + b"0\r\n" + b"a: b\r\n" * 9000 + b"\r\n", "the request's trailers have"),
    ],
)
def test_what_is_too_large_is_named(attacked: Target, sent: bytes, error: str) -> None:
    with Raw(attacked.port()) as client:
        client.send(sent)
        assert check_answer(attacked, client.reply(), 431).json()["error"].startswith(error)


@pytest.mark.parametrize(
    "sent",
    [
        head("x-request-id: mine", "Content-Length: 1", "Content-Length: 1"),
        head("x-request-id: mine", CHUNKED) + b"z\r\n",
        head("x-request-id: mine", CHUNKED) + b"0\r\n?\r\n\r\n",
        head("x-request-id: other", method="GET", path="/health")
        + head("x-request-id: mine").replace(b"1.1", b"1.0").replace(b"HTTP/1.0", b"HTTP/0.9"),
    ],
)
def test_a_refusal_has_the_requests_id(attacked: Target, sent: bytes) -> None:
    with Raw(attacked.port()) as client:
        client.send(sent)
        replies = list(iter(client.reply, None))
    assert replies[-1].status == 400
    assert replies[-1].headers["x-request-id"] == "mine"


def test_a_refusal_has_not_the_id_of_the_request_before(attacked: Target) -> None:
    with Raw(attacked.port()) as client:
        client.send(head("x-request-id: mine", method="GET", path="/health"))
        check_answer(attacked, client.reply(), 200)
        client.send(b"{}\r\n\r\n")
        assert len(check_answer(attacked, client.reply(), 400).headers["x-request-id"]) == 32


def test_many_connections_shut_nobody_out(attacked: Target) -> None:
    port = attacked.port(Limits(head_s=61), connections=8)
    with ExitStack() as stack:
        silent = [stack.enter_context(Raw(port)) for _ in range(20)]
        for client in silent:
            with suppress(ConnectionError):
                client.send(b"POST ")
        attacked.check(port)
        assert silent[0].reply() is None
        silent[-1].send(HONEST.removeprefix(b"POST "))
        check_answer(attacked, silent[-1].reply(), 200)


def test_a_client_that_does_not_read(attacked: Target) -> None:
    port = attacked.port(Limits(send_s=0.2))
    with Raw(port) as client, pytest.raises(ConnectionError):
        client.send(LARGE * 100_000)
    attacked.check(port)


def test_a_client_that_reads_slowly(attacked: Target) -> None:
    port = attacked.port(Limits(send_s=0.2))
    with Raw(port) as client:
        client.send(LARGE * 500)
        for _ in range(500):
            assert (reply := client.reply())
            assert reply.status == 200
    attacked.check(port)


def test_who_leaves_with_the_request_sent_is_noticed(attacked: Target) -> None:
    """It cannot be told at once from one that only sends no more."""
    port = attacked.port()
    with attacked.held():
        with Raw(port) as client:
            client.send(HONEST)
            attacked.holds(1)
        attacked.holds(0)
    attacked.check(port)


def test_what_follows_a_refusal_is_taken(attacked: Target) -> None:
    """A client that sends first, and reads then, gets its answer."""
    with Raw(attacked.port()) as client:
        client.send(head("Content-Length: 999999999"))
        attacked.settle()
        for _ in range(8):
            client.send(MEGABYTE)
        check_answer(attacked, client.reply(), 413)


def test_what_follows_a_refusal_is_not_taken_for_ever(attacked: Target) -> None:
    port = attacked.port(Limits(close_s=0.2))
    with Raw(port) as client:
        client.send(b"{}\r\n\r\n")
        check_answer(attacked, client.reply(), 400)
        with pytest.raises(ConnectionError):
            client.send_on(MEGABYTE)
    attacked.check(port)


def test_many_small_chunks_leave_others_their_turn() -> None:
    wire = Wire(head_bytes=9999)
    wire.receive_data(head(CHUNKED) + b"1\r\nx\r\n" * 10_000 + b"0\r\n\r\n")
    turns = [list(iter(wire.next_event, h11.NEED_DATA))]
    while wire.tired:
        wire.rest()
        turns.append(list(iter(wire.next_event, h11.NEED_DATA)))
    assert max(map(len, turns)) == EVENTS_AT_ONCE
    assert sum(map(len, turns)) == 10_002
