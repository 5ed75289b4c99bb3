"""A short run of what `python -m tests.attack.contract` does at length."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attack.contract import found_wrong


@pytest.mark.parametrize("keys", [False, True], ids=["open", "with keys"])
def test_the_description_is_true(keys: bool, tmp_path: Path) -> None:
    wrong = found_wrong(tmp_path, "--phases=fuzzing", "--max-examples=8", keys=keys)
    assert not wrong, wrong
