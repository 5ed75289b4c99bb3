"""A short run of what `python -m tests.attack.contract` does at length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.attack.contract import found_wrong


@pytest.mark.parametrize(
    ("keys", "model"),
    [
        (True, {}),
        pytest.param(False, {}, marks=pytest.mark.long),
        pytest.param(False, {"multi_label": True}, marks=pytest.mark.long),
        pytest.param(False, {"thresholds": (1.0, 1.0, 1.0)}, marks=pytest.mark.long),
    ],
    ids=["with keys", "open", "multi-label", "abstaining"],
)
def test_the_description_is_true(keys: bool, model: dict[str, Any], tmp_path: Path) -> None:
    wrong = found_wrong(tmp_path, "--phases=fuzzing", "--max-examples=8", keys=keys, **model)
    assert not wrong, wrong
