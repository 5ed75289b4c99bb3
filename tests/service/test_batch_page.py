"""What docs/api.md tells people to type for batches and other inputs, typed, over a socket."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.attack.contract import listening
from tests.service.asgi import PATIENCE_S, TEXT, save_checkpoint

API = (Path(__file__).parents[2] / "docs" / "api.md").read_text()

needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")


def commands(section: str) -> list[str]:
    """Those of the section, in order."""
    text = API.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^    (printf.*|curl.*)$", text, re.MULTILINE)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with listening(save_checkpoint(tmp_path_factory.mktemp("tiny"))) as url:
        yield url


def typed(url: str, folder: Path, *lines: str) -> list[Any]:
    """The lines of what these commands say."""
    script = "\n".join(lines).replace("http://127.0.0.1:8000", url)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_curl
def test_a_batch(url: str, tmp_path: Path) -> None:
    one, two, three = typed(url, tmp_path, *commands("Batches"))
    assert (one["id"], three["id"]) == ("one", 3)
    assert (two["error_type"], two["status"]) == ("Empty", 400)


@needs_curl
@pytest.mark.parametrize("command", commands("Other inputs"))
def test_inputs(url: str, tmp_path: Path, command: str) -> None:
    if "text/html" in command and not find_spec("inscriptis"):
        pytest.skip("needs inscriptis")
    (answer,) = typed(url, tmp_path, command)
    assert answer["label"]


@pytest.mark.anyio
async def test_answers_come_while_lines_are_sent(url: str) -> None:
    """Over one connection, in which neither side waits for the other."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    line = json.dumps({"text": TEXT}).encode() + b"\n"
    head = (
        "POST /v1/documents:batch HTTP/1.1",
        "host: service",
        "content-type: application/x-ndjson",
        "transfer-encoding: chunked",
    )
    async with asyncio.timeout(PATIENCE_S):
        writer.write("\r\n".join([*head, "", ""]).encode())
        for number in range(1, 4):
            writer.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
            while not (answer := await reader.readline()).startswith(b"{"):
                assert answer
            assert json.loads(answer)["line"] == number
        writer.write(b"0\r\n\r\n")
        while (await reader.readline()) != b"0\r\n":
            pass
    writer.close()


@needs_curl
def test_curl_reads_while_it_sends(url: str, tmp_path: Path) -> None:
    """Far more than what connections buffer, both ways."""
    (tmp_path / "lines").write_bytes((b'{"text": ""' + b" " * 1000 + b"}\n") * 5_000)
    command = (
        "curl -sN -T lines -X POST -H 'Content-Type: application/x-ndjson' "
        "http://127.0.0.1:8000/v1/documents:batch | wc -l"
    )
    assert typed(url, tmp_path, command) == [5_000]
