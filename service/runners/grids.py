"""The grids that a runner's steps have, and how each is warmed up."""

from __future__ import annotations

import numpy as np

from gma.model.config import ModelConfig
from gma.model.grid import Grid
from gma.service.engine.step import Batch, Runner


def grids_up_to(rows: int, chunk: int, config: ModelConfig) -> tuple[Grid, ...]:
    """Every power of two of rows below `rows`, and `rows`: a lone short document does not pay for
    all. Raises ValueError for rows that are too short."""
    if rows < 1 or chunk < max(1, config.tail):
        raise ValueError(f"a grid of {rows} x {chunk}: rows >= 1, chunk >= {max(1, config.tail)}")
    powers = [1 << i for i in range((rows - 1).bit_length())]
    return tuple(Grid(r, chunk) for r in [*powers, rows])


def warm_up(runner: Runner, grid: Grid) -> None:
    """Run a full step, in every pass, in the scratch slot, while no document has pages.

    Raises RuntimeError if a result is not finite.
    """
    batch = Batch.blank(grid, runner.slots)
    ids = np.arange(batch.tokens.size) % runner.vocab_size
    batch.tokens[:] = ids.reshape(grid)
    batch.lengths[:] = grid.chunk
    batch.page_of_row[:] = np.arange(grid.rows) % max(runner.pages, 1)
    batch.last_pass[:] = runner.passes - 1
    outcome = runner.launch(batch).outcome()
    if not (outcome.finite.all() and np.isfinite(outcome.logits[-1]).all()):
        raise RuntimeError(
            f"a step of {grid.rows} x {grid.chunk} tokens gives what is not finite: "
            "the weights are damaged, or too large for this device's precision"
        )
