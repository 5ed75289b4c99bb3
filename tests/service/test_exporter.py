"""Metrics of a machine's processes, from one that is none of them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from gma.service.observe.exporter import Exporter
from tests.service.running import needs_ipv6

COUNT = """
import os, sys
os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[1]
from gma.service.observe import metrics
metrics.TOKENS.labels('a').inc(int(sys.argv[2]))
"""


@contextmanager
def exporting(host: str) -> Iterator[int]:
    """On the port that this yields."""
    with Exporter(host, 0) as exporter:
        thread = threading.Thread(target=exporter.serve_forever)
        thread.start()
        yield exporter.server_port
        exporter.shutdown()
        thread.join()


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with exporting("127.0.0.1") as port:
        yield f"http://127.0.0.1:{port}"


def test_sums_every_process_of_the_folder(url: str, tmp_path: Path) -> None:
    for tokens in (3, 4):
        command = [sys.executable, "-c", COUNT, str(tmp_path), str(tokens)]
        subprocess.run(command, check=True)
    response = httpx.get(f"{url}/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'gma_tokens_total{model="a"} 7.0' in response.text.splitlines()


def test_head_is_get_without_the_body(url: str) -> None:
    got, asked = httpx.get(f"{url}/metrics"), httpx.head(f"{url}/metrics")
    assert (asked.status_code, asked.content) == (200, b"")
    assert asked.headers["content-type"] == got.headers["content-type"]
    assert httpx.head(f"{url}/").status_code == 404


def test_has_nothing_else(url: str) -> None:
    assert httpx.get(f"{url}/").status_code == 404


@needs_ipv6
@pytest.mark.parametrize(("host", "reached"), [("::1", ["[::1]"]), ("::", ["[::1]", "127.0.0.1"])])
def test_of_ipv6(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, reached: list[str]
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with exporting(host) as port:
        for each in reached:
            assert httpx.get(f"http://{each}:{port}/metrics").status_code == 200
