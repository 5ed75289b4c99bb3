"""`gma batch --address` on a simulated cluster, of which a machine is lost.

`pytest -m long tests/deploy/simulation`, as root.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from tests.deploy.simulation.cluster import PATIENCE_S, Cluster, started, until
from tests.deploy.simulation.network import Network, lacks
from tests.deploy.simulation.pod import SHARED
from tests.service.batch.archive import PART_BYTES, answers, by_id, texts, write_jsonl

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.skipif(lacks() is not None, reason=f"{lacks()}"),
]

COUNT = 200

ALIVE = """
import ray, sys, time
ray.init(logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(0.5)
"""

# So that there is a half-way: a tiny model that takes its time.
SLOW = {"GMA_ROWS": "1", "GMA_CHUNK_TOKENS": "8", "GMA_THREADS": "1"}


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    for each in (folder, *folder.parents[:2]):  # for the pods' user
        each.chmod(0o755)
    network = Network(f"gma{os.getpid()}")
    with network.up(), started(network, folder) as made:
        machines = str(1 + len(made.workers))
        made.run_on_head("alive", ["python", "-c", ALIVE, machines])
        until(lambda: made.head.status("alive") == 0, f"{machines} machines")
        yield made


def test_a_machine_that_is_lost_loses_and_doubles_nothing(cluster: Cluster) -> None:
    out = cluster.shared / "out"
    file = write_jsonl(cluster.shared / "in.jsonl", [{"text": text} for text in texts(COUNT)])
    file.chmod(0o644)
    options = ["--checkpoint", "/model/checkpoint", "--part-bytes", str(PART_BYTES)]
    cluster.run_on_head(
        "batch",
        ["gma", "batch", f"{SHARED}/in.jsonl", "--out", f"{SHARED}/out", *options,
         "--address", "auto", "--device", "cpu"],
        **SLOW,
    )  # fmt: skip
    end = time.monotonic() + PATIENCE_S
    while len([*out.glob("part-*")]) < 5:
        assert not cluster.head.ended("batch"), cluster.head.log("batch")
        assert time.monotonic() < end, "no parts are done"
        time.sleep(0.05)
    cluster.workers.pop().kill()
    before = len([*out.glob("part-*")])
    until(lambda: cluster.head.ended("batch"), "the end of the archive")
    assert cluster.head.status("batch") == 0, cluster.head.log("batch")
    assert by_id(out).keys() == {f"{SHARED}/in.jsonl:{n}" for n in range(1, COUNT + 1)}
    assert {row["error"] for row in answers(out)} == {None}
    assert (out / "_SUCCESS").exists()
    assert before < len([*out.glob("part-*")])
