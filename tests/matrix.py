"""Parameters of tests: some cases always, the others where the long tests run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def matrix(*axes: Sequence[Any], always: Sequence[tuple[Any, ...]]) -> list[Any]:
    """List all combinations of the axes; those that are not in ``always`` are marked long."""
    cases = list(product(*axes))
    assert set(always) <= set(cases)
    return [
        case if case in always else pytest.param(*case, marks=pytest.mark.long) for case in cases
    ]


def some(cases: Sequence[Any], *, always: Sequence[Any]) -> list[Any]:
    """As `matrix`, of one parameter."""
    assert set(always) <= set(cases)
    return [x if x in always else pytest.param(x, marks=pytest.mark.long) for x in cases]
