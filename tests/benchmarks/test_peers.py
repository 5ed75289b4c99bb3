from __future__ import annotations

import asyncio
import hashlib

import pytest
from aiohttp import ClientSession, web

from benchmarks.peers.__main__ import Asking, Figures, Server, scores_of, table

BOOK = "It was a bright cold day. " * 1000


def became_of_the_book(*, read: int = 10**6, most_bytes: int = 10**6) -> str:
    """What is said of a server that reads so many characters, and takes so many bytes."""

    async def classify(request: web.Request) -> web.Response:
        text = (await request.json())["text"][:read]
        score = hashlib.sha256(text.encode()).digest()[0] / 256
        return web.json_response({"scores": [{"label": "a", "score": score}]})

    async def ask() -> str:
        app = web.Application(client_max_size=most_bytes)
        app.router.add_post("/classify", classify)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0][:2]
            server = Server("a server", (), "/classify", "text", str, {})
            async with ClientSession(f"http://{host}:{port}") as http:
                return (await Asking(server, http).book(BOOK))[1]
        finally:
            await runner.cleanup()

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (10**6, "read whole"),
        (1000, "read no further than 4 KB, unsaid"),
        (9000, "read to its middle"),
    ],
)
def test_what_becomes_of_a_book(read: int, told: str) -> None:
    assert became_of_the_book(read=read) == told


def test_one_that_refuses_a_book_says_so() -> None:
    assert became_of_the_book(most_bytes=1000) == "413; its half: 413; its half: 413; its half: 413"


def test_one_that_takes_a_part_is_asked_what_it_reads_of_it() -> None:
    told = became_of_the_book(most_bytes=20_000, read=1000)
    assert told == "413; its half: read no further than 4 KB, unsaid"


def test_scores_are_found_in_every_server_s_answer() -> None:
    ours = {"label": "a", "scores": [{"label": "a", "score": 0.75}, {"label": "b", "score": 0.25}]}
    infinity = {"data": [[{"score": 0.75, "label": "a"}, {"score": 0.25, "label": "b"}]]}
    assert scores_of(ours) == scores_of(infinity) == [0.75, 0.25]


def test_the_table_has_medians() -> None:
    figures = Figures([1, 2, 9], [10, 30, 20], [5, 5, 5], [100, 100, 400], [0.5, 1, 2], "whole")
    assert table({"a server": figures}).splitlines()[-1] == (
        "| a server | 2.0 | 20 | 5 | 1.00 | whole | 100 |"
    )
