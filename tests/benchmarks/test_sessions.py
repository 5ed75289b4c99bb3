"""The comparison of appends: its clients against a service in this process, and its table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import sessions
from benchmarks.sessions import Length, Sizes, Turn
from gma.service.client.loop import Loop
from tests.service.asgi import Service, save_checkpoint
from tests.service.client.served import served


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop, store = Loop(), tmp_path / "sessions"
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    service = Service(checkpoint, sessions=store, chunk_tokens=256)
    loop.call(service.__aenter__())
    with served(service.app, loop) as url:
        sessions.main(["--quick", "--url", url])
    loop.call(service.__aexit__())
    loop.close()
    printed = capsys.readouterr().out
    assert "append 1 KB to 0.02 MB" in printed
    rates = dict(
        re.findall(r"^\| (appends|posts) of 1 KB, 2 at once \| ([\d.]+) \|", printed, re.MULTILINE)
    )
    assert rates.keys() == {"appends", "posts"}
    assert all(float(rate) > 0 for rate in rates.values())
    assert not [*store.glob("*.safetensors")]


def test_table() -> None:
    length = Length([0.011, 0.022, 0.033], [0.01, 0.02, 0.03])
    turns = {
        "appends": [Turn([0.1] * 8, 1.0), Turn([0.1] * 20, 2.0), Turn([0.1] * 9, 1.0)],
        "posts": [Turn([0.05] * 10, 1.0), Turn([0.05] * 10, 1.0), Turn([0.05] * 12, 1.0)],
    }
    assert sessions.ratio(turns) == 0.8
    assert sessions.length_table(length, Sizes()).splitlines()[2:] == [
        "| append 1 KB to 10 MB | 22.0 ms | 1.10 |",
        "| append 1 KB to one that began empty | 20.0 ms |  |",
    ]
    assert sessions.rate_table(turns, Sizes()).splitlines()[2:] == [
        "| appends of 1 KB, 8 at once | 9.0 | 100.0 ms | 100.0 ms | 0.80 |",
        "| posts of 1 KB, 8 at once | 10.0 | 50.0 ms | 50.0 ms |  |",
    ]
