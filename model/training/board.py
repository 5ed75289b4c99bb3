"""The log of a run for TensorBoard, where that is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gma.model.training.measured import prefix_name

FOLDER = "tensorboard"
"""Of a run: what `tensorboard --logdir` is given."""


class Board:
    """Gets the numbers of each line of the log; does nothing without TensorBoard."""

    def __init__(self, out: Path, step: int) -> None:
        """``step``: of what an interrupted run wrote, all from there on is dropped."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            self._writer = None
        else:
            self._writer = SummaryWriter(out / FOLDER, purge_step=step)

    def add(self, step: int, line: Mapping[str, object]) -> None:
        """Write a line of the log, so that it can be seen at once."""
        if self._writer is None:
            return
        for name, value in scalars(line):
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield what of a line of the log is a number, with a name such as ``valid/4 KB/accuracy``."""
    for name, value in line.items():
        match value:
            case bool():
                pass
            case int() | float():
                yield f"train/{name}", value
            case {"views": [*views]}:
                for view in views:
                    prefix = prefix_name(view["prefix_bytes"])
                    for figure, number in view.items():
                        if figure != "prefix_bytes":
                            yield f"{name}/{prefix}/{figure}", number
            case {}:
                for inner, number in value.items():
                    if isinstance(number, int | float):
                        yield f"{name}/{inner}", number
