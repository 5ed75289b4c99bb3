"""What TensorBoard shows of a run, where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gma.model.training.board import FOLDER, scalars
from tests.model.training.documents import Train, interrupted, log_of


def test_the_numbers_of_a_line() -> None:
    line = {
        "label_loss": 0.5,
        "valid": {"documents": 6, "views": [{"prefix_bytes": 4096, "accuracy": 0.75}]},
        "stacking": {"deep": 0.4, "offsets": [0.1]},
        "kept": True,
        "warnings": ["a"],
    }
    assert dict(scalars(line)) == {
        "train/label_loss": 0.5,
        "valid/4 KB/accuracy": 0.75,
        "stacking/deep": 0.4,
    }


def test_a_run_needs_no_tensorboard(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    folder = run().parent
    assert not (folder / FOLDER).exists()


def test_it_has_what_the_log_has(run: Train, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with interrupted():
        run()
    checkpoint = run(resume=True)
    events = EventAccumulator(str(tmp_path / "run" / FOLDER))
    events.Reload()
    logged = [line for line in log_of(checkpoint) if "label_loss" in line]
    shown = events.Scalars("train/label_loss")
    assert [each.step for each in shown] == [line["step"] for line in logged]
    assert [each.value for each in shown] == pytest.approx([x["label_loss"] for x in logged])
    measured = [line for line in log_of(checkpoint) if "valid" in line]
    whole = events.Scalars("valid/whole/accuracy")
    assert [each.step for each in whole] == [line["step"] for line in measured]
