"""The notebook in docs/examples says what its cells print."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "examples" / "classify.ipynb"


@pytest.fixture
def cells() -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells: list[dict[str, Any]] = notebook["cells"]
    return cells


def test_its_outputs_are_those_of_its_cells(
    cells: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(NOTEBOOK.parent)
    names: dict[str, Any] = {}
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    for number, cell in enumerate(code, 1):
        printed = StringIO()
        with redirect_stdout(printed):
            exec("".join(cell["source"]), names)  # noqa: S102  # our own
        shown = ["".join(output["text"]) for output in cell["outputs"]]
        assert shown == [printed.getvalue()], cell["id"]
        assert cell["execution_count"] == number


def test_its_cells_are_well_formed(cells: list[dict[str, Any]]) -> None:
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | code
