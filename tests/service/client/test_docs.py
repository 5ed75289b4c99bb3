"""The examples in docs/python.md of a service run as they stand."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from gma import Client
from tests.service.client.served import served
from tests.service.client.sessions import Sessions

DOCS = Path(__file__).parents[3] / "docs"
SECTION = (DOCS / "python.md").read_text().partition("## From a service")[2]
CLASSIFYING, ASYNCIO, SESSIONS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


def run(example: str, url: str, **names: Any) -> None:
    assert example.count("http://127.0.0.1:8000") == (0 if names else 1)
    exec(example.replace("http://127.0.0.1:8000", url), names)  # noqa: S102  # our own


def test_classifying(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(DOCS / "examples" / "agreement.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    run(CLASSIFYING, url)
    first, *progress, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\('\w+',\) 0\.\d+", first)
    assert progress
    assert all(re.fullmatch(r"\d+ \('\w+',\)", line) for line in progress)
    assert re.fullmatch(r"\('\w+',\) \d+", last)


def test_asyncio(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(ASYNCIO, url)
    assert re.fullmatch(r"\[\('\w+',\), \('\w+',\)\]\n", capsys.readouterr().out)


def test_sessions(capsys: pytest.CaptureFixture[str]) -> None:
    with served(Sessions()) as url, Client(url) as client:
        run(SESSIONS, url, client=client)
    assert capsys.readouterr().out == "('ann',)\n('ann',)\n68 58\n"
