"""`gma batch --address` on a Ray cluster of this machine: two nodes, one of which is killed.

`pytest -m long tests/service/batch/test_cluster.py`
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gma.service.app.ray import LOOPBACK, set_environment
from tests.service.batch.archive import PART_BYTES, answers, by_id, texts, write_jsonl

pytestmark = [pytest.mark.long, pytest.mark.slow]

COUNT = 200
PATIENCE_S = 300

NODE: dict[str, Any] = {
    "num_cpus": 1,
    "node_ip_address": LOOPBACK,
    "object_store_memory": 80 * 2**20,
    "dashboard_agent_listen_port": 0,
}

# So that there is a half-way: a tiny model that takes its time.
SLOW = {"GMA_ROWS": "1", "GMA_CHUNK_TOKENS": "8", "GMA_THREADS": "1"}


class Running(NamedTuple):
    """A cluster, and what is needed to reach it."""

    address: str
    second: Any
    """The node that is not the head."""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    set_environment()
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    from ray.cluster_utils import Cluster

    made = Cluster(head_node_args=NODE | {"include_dashboard": False}, initialize_head=True)
    try:
        second = made.add_node(**NODE)
        yield Running(made.address, second)
    finally:
        made.shutdown()  # type: ignore[no-untyped-call]


def command(address: str, checkpoint: Path, folder: Path) -> list[str]:
    main = "from gma.service.cli.main import main; main()"
    files = ["in.jsonl", "--out", "out", "--checkpoint", str(checkpoint)]
    options = ["--part-bytes", str(PART_BYTES), "--address", address, "--device", "cpu"]
    write_jsonl(folder / "in.jsonl", [{"text": text} for text in texts(COUNT)])
    return [sys.executable, "-c", main, "batch", *files, *options]


def check_whole(out: Path) -> None:
    """Check that each text has one answer, and none an error."""
    assert by_id(out).keys() == {f"in.jsonl:{n}" for n in range(1, COUNT + 1)}
    assert {row["error"] for row in answers(out)} == {None}
    assert (out / "_SUCCESS").exists()


def test_a_node_that_is_killed_loses_and_doubles_nothing(
    cluster: Running, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        command(cluster.address, checkpoint, tmp_path),
        cwd=tmp_path,
        env=os.environ | SLOW,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        end = time.monotonic() + PATIENCE_S
        while len([*out.glob("part-*")]) < 5:
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < end, "no parts are done"
            time.sleep(0.05)
        (raylet,) = cluster.second.all_processes["raylet"]
        os.kill(raylet.process.pid, signal.SIGKILL)
        before = {each: each.stat().st_mtime_ns for each in out.glob("part-*")}
        told, complaints = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0, complaints
    check_whole(out)
    assert len(before) < len([*out.glob("part-*")])
    assert told.startswith("out: ")
    again = subprocess.run(
        command(cluster.address, checkpoint, tmp_path),
        cwd=tmp_path,
        env=os.environ | SLOW,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 1
    assert "out was begun otherwise: in.jsonl has changed" in again.stderr  # it was written anew
