"""docs/onnx.md says what the code says."""

from __future__ import annotations

from pathlib import Path

from gma.export.operators import OPERATORS
from gma.export.verification import TOLERANCES

TEXT = (Path(__file__).parents[2] / "docs" / "onnx.md").read_text(encoding="utf-8")


def test_operators() -> None:
    assert "\n".join(operators()) in TEXT


def test_tolerances() -> None:
    assert "\n".join(tolerances()) in TEXT


def operators() -> list[str]:
    return [
        f"| `{x.name}` | {_names(x.inputs)} | {_names(x.outputs)} | {_names(x.attributes)} |"
        for x in OPERATORS.values()
    ]


def tolerances() -> list[str]:
    return [f"| {name} | {x.logits:g} | {x.states:g} |" for name, x in TOLERANCES.items()]


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names)
