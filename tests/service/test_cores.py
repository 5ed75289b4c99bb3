"""How many cores there are to use, in a container as on a machine."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from gma.service.app.process import gateway_count
from gma.service.cli.main import main
from gma.service.cores import cores, cores_for
from gma.service.runners import loading
from gma.service.settings import Settings
from tests.service.asgi import Service

V1 = "32 31 0:29 / {point} rw - cgroup cgroup rw,cpu,cpuacct"
V2 = "41 31 0:38 / {point} rw - cgroup2 cgroup2 rw"


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


def machine(root: Path, groups: str, mounts: str, **files: str) -> Path:
    """What the kernel tells, below `root`. The files are those of a folder that is mounted."""
    for path, content in {
        "proc/self/cgroup": groups,
        "proc/self/mountinfo": mounts,
        **files,
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content + "\n")
    return root


def v2(root: Path, path: str, **quotas: str) -> Path:
    """Version 2, by the folder of each group below /c with a quota."""
    files = {f"c/{group.strip('/')}/cpu.max": quota for group, quota in quotas.items()}
    return machine(root, f"0::{path}", V2.format(point="/c"), **files)


@pytest.mark.parametrize(
    ("quota", "count"),
    [("50000 100000", 1), ("100000 100000", 1), ("250000 100000", 3), ("max 100000", 64)],
)
def test_a_quota_of_version_2(tmp_path: Path, quota: str, count: int) -> None:
    assert cores(v2(tmp_path, "/", **{"": quota})) == count


@pytest.mark.parametrize(("quota", "count"), [(50_000, 1), (250_000, 3), (-1, 64)])
def test_a_quota_of_version_1(tmp_path: Path, quota: int, count: int) -> None:
    files = {"c/cpu.cfs_quota_us": str(quota), "c/cpu.cfs_period_us": "100000"}
    groups = "9:name=systemd:/x\n2:cpu,cpuacct:/"
    assert cores(machine(tmp_path, groups, V1.format(point="/c"), **files)) == count


def test_the_least_of_a_group_and_those_above_it_counts(tmp_path: Path) -> None:
    root = v2(tmp_path, "/pod/box", pod="200000 100000", **{"pod/box": "800000 100000"})
    assert cores(root) == 2


def test_a_container_that_is_told_its_path_on_the_machine(tmp_path: Path) -> None:
    """Its mount shows its own group at the top."""
    assert cores(v2(tmp_path / "a", "/docker/abc", **{"": "200000 100000"})) == 2
    mount = V2.format(point="/c").replace(" / /c", " /docker /c")
    files = {"c/abc/cpu.max": "300000 100000"}
    assert cores(machine(tmp_path / "b", "0::/docker/abc", mount, **files)) == 3
    assert cores(v2(tmp_path / "c", "/../abc", **{"": "400000 100000"})) == 4


def test_affinity_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5})
    assert cores(v2(tmp_path, "/", **{"": "400000 100000"})) == 2


def test_without_control_groups(tmp_path: Path) -> None:
    assert cores(tmp_path) == 64


def test_commands_compute_with_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("gma.service.cli.main.cores", lambda: 3)
    monkeypatch.setattr(sys, "argv", ["gma", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(("quota", "count"), [(0.5, 2), (4, 2), (8, 4), (64, 8)])
def test_gateways_by_the_quota(
    quota: float, count: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = v2(tmp_path, "/", **{"": f"{int(quota * 100_000)} 100000"})
    monkeypatch.setattr("gma.service.cores.cores", lambda: cores(root))
    assert gateway_count(Settings.load(checkpoint=checkpoint)) == count
    assert gateway_count(Settings.load(checkpoint=checkpoint, gateways=1)) == 1


class TestSetting:
    """Of a container that asks for CPUs without a limit: by the kernel it has all 64."""

    def test_goes_before_what_there_is(self, checkpoint: Path) -> None:
        assert cores_for(Settings.load(checkpoint=checkpoint, cores=3)) == 3
        assert cores_for(Settings.load(checkpoint=checkpoint)) == cores()

    def test_of_gateways(self, checkpoint: Path) -> None:
        assert gateway_count(Settings.load(checkpoint=checkpoint, cores=8)) == 4

    @pytest.mark.parametrize(("threads", "count"), [(0, 3), (2, 2)])
    def test_of_what_torch_computes_with(self, checkpoint: Path, threads: int, count: int) -> None:
        before = torch.get_num_threads()
        try:
            loading.load(Settings.load(checkpoint=checkpoint, cores=3, threads=threads))
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(before)

    @pytest.mark.anyio
    @pytest.mark.parametrize("large", [True, False])
    async def test_of_what_tokenizes(self, checkpoint: Path, large: bool) -> None:
        before = set(threading.enumerate())
        go = threading.Event()
        async with Service(checkpoint, cores=2) as service:
            calls = [
                asyncio.create_task(service.gateway.in_thread(go.wait, large=large))
                for _ in range(6)
            ]
            await asyncio.sleep(0)  # each has asked for a thread
            name = "tokenize" if large else "small"
            begun = [x for x in set(threading.enumerate()) - before if x.name.startswith(name)]
            go.set()
            await asyncio.gather(*calls)
        assert len(begun) == 2
