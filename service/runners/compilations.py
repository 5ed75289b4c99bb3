"""How often something was compiled in this process."""

from __future__ import annotations

import sys
from typing import Any


class Compilations:
    """Counts what Triton compiles from now on, and what torch.compile did in this process.

    What a cache has is loaded, not compiled, and not counted. Reading takes microseconds.
    """

    def __init__(self) -> None:
        self._kernels = 0
        self._graphs = _graphs()
        self._told = 0
        # Only where Triton is used anyway: it is not installed everywhere.
        knobs = sys.modules.get("triton.knobs")
        if knobs is not None:
            self._before = knobs.compilation.listener
            knobs.compilation.listener = self._compiled

    def new(self) -> int:
        """How many there were since this was last asked."""
        total = self._kernels + _graphs() - self._graphs
        new, self._told = total - self._told, total
        return new

    def _compiled(self, *, cache_hit: bool, **about: Any) -> None:
        self._kernels += not cache_hit
        if self._before is not None:
            self._before(cache_hit=cache_hit, **about)


def _graphs() -> int:
    """Graphs that torch.compile made, those for a new shape included."""
    utils = sys.modules.get("torch._dynamo.utils")
    return int(utils.counters["stats"]["unique_graphs"]) if utils is not None else 0
