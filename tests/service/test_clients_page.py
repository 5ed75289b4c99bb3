"""What docs/clients.md says to run is answered, by real clients over a socket."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attack.contract import listening
from tests.service.asgi import LABELS, PATIENCE_S, save_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", PAGE.read_text(), re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
PROGRAMS = [block for kind, block in BLOCKS if kind == "python"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with listening(save_checkpoint(tmp_path_factory.mktemp("tiny"))) as url:
        yield url


def here(text: str, url: str) -> str:
    """What the page says, for the service of this test."""
    return text.replace("127.0.0.1:8000", url.removeprefix("http://")).replace("contracts", "tiny")


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize("command", COMMANDS)
def test_commands(url: str, command: str) -> None:
    ran = subprocess.run(
        shlex.split(here(command, url)),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ran.returncode == 0, ran
    assert "ann" in json.dumps(json.loads(ran.stdout))


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(url: str, program: str) -> None:
    needed = re.findall(r"^(?:from|import) (\w+)", program, re.MULTILINE)
    if missing := [name for name in needed if not importlib.util.find_spec(name)]:
        pytest.skip(f"needs {', '.join(missing)}")
    ran = subprocess.run(
        [sys.executable, "-c", here(program, url)],
        env=os.environ | {"HF_HUB_OFFLINE": "0"},  # or it asks nobody, whoever they are
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert any(label in ran.stdout for label in LABELS)


def test_clients_that_offer_http_2(url: str) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    body = b'{"inputs": "a"}'
    head = (  # as Java's HttpClient has it
        "POST /predict HTTP/1.1",
        "Connection: Upgrade, HTTP2-Settings",
        f"Content-Length: {len(body)}",
        "Host: service",
        "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
        "Upgrade: h2c",
        "User-Agent: Java-http-client/17",
        "Content-Type: application/json",
    )
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as client:
        client.sendall("\r\n".join([*head, "", ""]).encode() + body)
        answer = b""
        while b"}]" not in answer:
            answer += (came := client.recv(2**16))
            assert came, answer
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"upgrade" not in answer.lower().partition(b"\r\n\r\n")[0]


def test_routes_and_links_are_there() -> None:
    for anchor in re.findall(r"\]\(#([\w-]+)\)", PAGE.read_text()):
        titles = re.findall(r"^## (.*)$", PAGE.read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
    api = (PAGE.parent / "api.md").read_text().lower()
    titles = re.findall(r"^#+ (.*)$", api, re.MULTILINE)
    for anchor in re.findall(r"\]\(api\.md#([\w-]+)\)", PAGE.read_text()):
        assert anchor in {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles}
