"""The comparison of lists with single texts: its turns against a service here, and its table."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks import lists
from tests.attack.contract import listening
from tests.service.asgi import save_checkpoint


def test_every_way_is_answered(tmp_path: Path) -> None:
    with listening(save_checkpoint(tmp_path)) as url:
        found = asyncio.run(lists.turns(url, texts=3, at_once=2, rounds=2))
    assert {way: len(speeds) for way, speeds in found.items()} == dict.fromkeys(
        (lists.OURS, lists.THEIRS, lists.LIST, lists.BATCH), 2
    )
    assert all(speed > 0 for speeds in found.values() for speed in speeds)


def test_the_most_within_the_slo(tmp_path: Path) -> None:
    with listening(save_checkpoint(tmp_path)) as url:
        found = asyncio.run(lists.rates(url, most=2, rounds=1, seconds=0.1))
    assert found.keys() == {lists.OURS, lists.THEIRS}
    assert {len(speeds) for speeds in found.values()} == {1}


def test_ratios_are_of_a_round() -> None:
    table = lists.table({lists.OURS: [1, 10, 2], lists.THEIRS: [2, 20, 4], lists.LIST: [4, 30, 8]})
    assert [line.split(" | ")[-1] for line in table.splitlines()[2:]] == [
        "1.00 |",
        "2.00 |",
        "4.00 |",
    ]
