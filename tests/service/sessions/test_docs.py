"""What docs/api.md tells people to type for a session, typed."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gma.service.http.listener import Listener
from tests.service.asgi import Service
from tests.service.running import free_port

pytestmark = pytest.mark.anyio

API = Path(__file__).parents[3] / "docs" / "api.md"


def commands() -> list[str]:
    """Those of the section, in order."""
    text = API.read_text().partition("\n## Sessions\n")[2].partition("\n### How fast")[0]
    return re.findall(r"^    (\S.*)$", text, re.MULTILINE)


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
async def test_commands(checkpoint: Path, tmp_path: Path) -> None:
    async with Service(checkpoint, sessions=tmp_path / "store") as service:
        port = free_port()
        listener = await Listener.open(service.app, "127.0.0.1", port)
        typed = "\n".join(commands()).replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        typed = typed.replace("curl -s ", "curl -sS --fail-with-body ")
        typed = re.sub(r"^curl", "echo; curl", typed, flags=re.MULTILINE)
        try:
            done = await asyncio.to_thread(
                subprocess.run,
                ["bash", "-euc", typed],
                cwd=tmp_path,
                capture_output=True,
                text=True,
            )
        finally:
            await listener.close()
    assert done.returncode == 0, done
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.strip()]
    assert [answer["offset"] for answer in answers] == [16, 33, 33, 55, 33]
    assert [answer.get("label", "") != "" for answer in answers] == [True] * 4 + [False]
    assert len(answers[1]["evidence"]) > 0
